"""The operator-level search: which loop of which operator is split over which axis of a mesh.

    operator graph + cluster -> candidates, prices -> ILP -> split of every operator

`search_operators` finds the fastest split of a captured graph (`models.opgraph`) by this cost
model, `price_operators` prices a given one with the same code. docs/operators.md tells how.
"""

"""The discrete-event simulator of serving: requests one by one, steps priced by the cost model.

    workload -> requests -> router -> engines (scheduler, cache blocks, step prices) -> record

`lengths`, `traces` and `workload` make requests; `describe` sums a workload up; `prices` turns a
`StepModel` into tables; `blocks` holds the cache; `scheduler` fills the steps of one engine; `unit`
runs engines that step together; `events` moves the clock over all of them, routes requests and
sends caches from prefill to decode instances; `record` and `sketch` keep what came out.
"""

"""placeholder"""
def derived_sections(*a): return []

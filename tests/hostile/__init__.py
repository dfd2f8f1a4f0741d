"""Campaigns that try to break the library: `make hostile`, and shorter in `make test`.

A campaign is a module with `attempt(random, say)`, which draws one input and tries it. It returns whether the library
answered or refused it, and raises where that was wrong or something else happened. `say` keeps what is being tried, for
a process that does not live to tell.
"""

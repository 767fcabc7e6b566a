"""The config of a run, and the names in its directory.

The way of one override, `parallel.tp=2`:

    overrides.py   is the key known, does the value fit its type? Quote what Hydra's grammar would misread.
    compose.py     Hydra merges the groups (model=tiny, optim=sgd, ...) and the overrides into a typed `Config`
    resume.py      a run that exists keeps its stored config; which keys may differ from it, and which may not
    limits.py      what each single value may be; combinations of values are judged in `stoker.trainer.validate`
    durable.py     files that survive a power failure; parent_death.py: processes that outlive no other
    rundir.py      `run.name` and `run.dir` are fixed once, and the composed config is written down as YAML

`schema.py` is the one place where a key, its default, its unit and its kind stand; a YAML group says only in what it
differs. Whatever a user can get wrong is a `ConfigError` of one line a problem, before any rank is started.

Composed values are plain: an interpolation (`${...}`) would be resolved anew by every rank and at every restart, so
it is refused. Hydra is imported by `compose` alone, and only when called: ranks receive the config ready-made.
"""

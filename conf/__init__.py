"""The config of a run, and the names in its directory.

The path of one override, `parallel.tp=2`:

    overrides.py   checks key and type; quotes values that Hydra's grammar would misread
    compose.py     Hydra merges the groups (model=tiny, optim=sgd, ...) and the overrides into a typed `Config`
    resume.py      a run that exists keeps its stored config; the keys that may differ from it
    limits.py      limits of single values; `stoker.trainer.validate` checks combinations
    durable.py     files that survive a power failure; parent_death.py: processes that end with their parent
    rundir.py      `run.name` and `run.dir` are fixed once, and the composed config is written down as YAML

`schema.py` is the one place that defines a key, its default, its unit and its kind; a YAML group holds only its
differences. Every error of a user is a `ConfigError` of one line a problem, before any rank is started.

Composed values are plain: an interpolation (`${...}`) would be resolved again by every rank and at every restart, so
it is refused. Only `compose` imports Hydra, and only when called: ranks receive the composed config.
"""

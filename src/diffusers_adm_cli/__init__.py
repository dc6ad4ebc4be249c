"""
The command `diffusers-adm`: the commands of `diffusers_adm` under one name.

A package of its own, because any import of `diffusers_adm` loads torch and diffusers, which takes seconds, and `--help`
must not wait for them. So nothing here imports more than the standard library before a command is known.
"""

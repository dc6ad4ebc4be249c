"""
The training scripts and their recipes, installed as `diffusers_adm.scripts`: `accelerate launch -m
diffusers_adm.scripts.train_adm ...`, or `diffusers-adm train adm ...`, work without a clone of the repository.
"""

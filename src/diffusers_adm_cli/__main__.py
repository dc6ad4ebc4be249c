"""`python -m diffusers_adm_cli`, where the folder of `diffusers-adm` is not in the path."""

from .main import main


if __name__ == "__main__":
    main()

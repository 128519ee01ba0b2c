"""Many runs at once: on the cards and cores of this machine, or on a Slurm cluster, by Dask's distributed scheduler."""

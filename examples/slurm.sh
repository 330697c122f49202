#!/usr/bin/env bash
# Answers on two nodes with eight GPUs each, one process a GPU. JAX joins what srun starts; task 0 prints the answer.
#
#   sbatch examples/slurm.sh /shared/bundle --video clip.mp4 --prompt "What happens?"
#
# The package, the bundle and the prompt's files must be where every node finds them.
#SBATCH --job-name=keye-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=00:30:00
set -euo pipefail

# Each task must see all GPUs of its node, for JAX takes the one with its local number: no --gpus-per-task here.
# One task that ends in an error ends the others by itself; the option is for nodes that are lost.
exec srun --kill-on-bad-exit=1 python -m runtime.generate "$@"

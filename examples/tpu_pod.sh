#!/usr/bin/env bash
# Answers on all hosts of a Cloud TPU slice: the same command in each, joined by themselves. Host 0 prints the answer.
#
#   examples/tpu_pod.sh TPU_NAME ZONE gs://bucket/bundle --video clip.mp4 --prompt "What happens?"
#
# Every host needs the package (`pip install -e '.[video,tpu]'` in a clone of the repository, with the same
# --worker=all), and under the same paths the files that the prompt names. Each reads from the bundle only what its own
# chips hold. Graphs that the bundle lacks are made at the start; this makes them before:
#   python -m runtime.export BUNDLE --platform tpu --topology v5e:4x4
set -euo pipefail

if (($# < 4)); then
  echo "usage: $0 TPU_NAME ZONE BUNDLE OPTIONS..." >&2
  exit 2
fi
name=$1 zone=$2
shift 2

# Quoted once more: the words pass through a shell on each host.
printf -v command '%q ' python3 -m runtime.generate "$@"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"

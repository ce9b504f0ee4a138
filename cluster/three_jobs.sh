#!/usr/bin/env bash
# The three jobs of an experiment in order, each with the same arguments; the first that fails ends the script with its
# exit status. Run again, it skips what is done:
#   cluster/three_jobs.sh --config jobs/recipes/var-d16.yaml --run s3://bucket/var-d16
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

for job in generate_pairs distill evaluate; do
  echo "== jobs/$job.py $*"
  python "jobs/$job.py" "$@"
done

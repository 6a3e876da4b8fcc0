#!/usr/bin/env bash
# What would be submitted to SLURM: everything is checked and the batch script printed; nothing is started.
#
#   docs/examples/slurm_dry_run.sh corpus/train [RUN]
#
# Without --dry-run the same command submits.
set -euo pipefail
images=$1 run=${2:-runs/on_slurm}

profile=$(mktemp --suffix .yaml)
trap 'rm -f "$profile"' EXIT
cat > "$profile" << YAML
partition: cpu          # of your cluster; seer-scale launch --print-profile explains every key
gpus_per_node: 0        # CPUs only
ranks_per_node: 2
cpus_per_rank: 4
time: 04:00:00          # of one job: the run goes on in the next
YAML

seer-scale launch photos_laptop --cluster slurm --profile "$profile" --nodes 1-2 \
  --data.path "$images" --run.dir "$run" --dry-run

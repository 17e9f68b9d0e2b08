# Environment of every job, sourced by launch/*.slurm. One reason per variable; nothing here changes results.

# The virtual environment of `make setup`; set VENV for another one. Where there is none, python3 is the cluster's.
VENV="${VENV:-.venv}"
if [ -f "$VENV/bin/activate" ]; then
    # shellcheck disable=SC1091  # written by venv
    . "$VENV/bin/activate"
fi

# Lines of a killed job reach its log instead of dying in a buffer.
export PYTHONUNBUFFERED=1

# Ranks share the node's cores: more threads than cores make every rank slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# A rank whose peer died gets an error instead of waiting in a collective that cannot end.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# Segments that can grow keep variable batch parts from fragmenting GPU memory.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# tar shards must never run commands or unpickle, whatever their names and members say.
export WDS_SECURE="${WDS_SECURE:-1}"

# Compute nodes often have no way out: a missing file must fail at once and not after a download's timeout.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

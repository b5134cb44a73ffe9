# What the scripts share; each of them begins with `source`-ing this file.
#
# Nothing in them has to be edited: flags of `python -m lightx2v.infer` (or .server) may follow a script's name, and go
# over what it says; and these variables may be set before it:
#   model_path    another model: a folder, or a Hub name such as Wan-AI/Wan2.2-T2V-A14B
#   config_json   another configuration, in LightX2V's format, instead of the script's preset
#   prompt, image_path, negative_prompt     what the video shows
#   nproc_per_node    GPUs of the scripts that use several (default: all)
#   python            the interpreter (default: the project's .venv, or else python3)

set -euo pipefail

lightx2v_path=${lightx2v_path:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
export PYTHONPATH=$lightx2v_path${PYTHONPATH:+:$PYTHONPATH}
if [[ -z ${python:-} ]]; then
    python=python3
    [[ -x $lightx2v_path/.venv/bin/python ]] && python=$lightx2v_path/.venv/bin/python
fi

# The configuration and the model, as flags in the array `what`:  choose PRESET
choose() {
    what=(--preset "$1")
    [[ -n ${config_json:-} ]] && what=(--config_json "$config_json")
    [[ -n ${model_path:-} ]] && what+=(--model_path "$model_path")
    return 0
}

# One video:  infer PRESET [FLAG ...]
infer() {
    choose "$1" && shift
    exec "$python" -m lightx2v.infer "${what[@]}" "${shown[@]}" "$@"
}

# One video on several GPUs, which share the guidance's two halves and the sequence as their number allows.
infer_parallel() {
    choose "$1" && shift
    exec "$python" -m torch.distributed.run --standalone --nproc_per_node "${nproc_per_node:-gpu}" \
        -m lightx2v.infer "${what[@]}" "${shown[@]}" "$@"
}

# What the video shows, as flags in the array `shown`:  show PROMPT [IMAGE]
show() {
    shown=(--prompt "${prompt:-$1}" --negative_prompt "${negative_prompt:-}")
    [[ $# -gt 1 ]] && shown+=(--image_path "${image_path:-$2}")
    return 0
}

#!/usr/bin/env bash
# Wan2.2-T2V-A14B, 40 steps, on several GPUs.
source "$(dirname "${BASH_SOURCE[0]}")/../base/base.sh"

show "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage."
infer_parallel t2v_base "$@"

#!/usr/bin/env bash
# Wan2.2-T2V-A14B, 40 steps, on one GPU. With --set cpu_offload=true it needs less of its memory.
source "$(dirname "${BASH_SOURCE[0]}")/../base/base.sh"

show "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage."
infer t2v_base "$@"

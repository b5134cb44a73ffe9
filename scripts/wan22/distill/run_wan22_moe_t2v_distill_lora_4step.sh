#!/usr/bin/env bash
# Text to video in 4 steps with the distilled LoRAs, on one GPU.
source "$(dirname "${BASH_SOURCE[0]}")/../../base/base.sh"

show "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage."
infer t2v_distill_lora "$@"

#!/bin/bash
# Measures jaxguide on one NVIDIA GPU beside compiled PyTorch, within 8 minutes: numerics, sampling, training, profiles.
# It can be cut off at any time: results are written one by one. Settings, all optional:
#   PYTHON   an interpreter that has jax with CUDA, flax, optax and torch. Without one an environment is made.
#   PEERS    a folder with OpenAI's guided-diffusion, which the UNet is measured against.
#   OUT      the folder of the results. Default: benchmarks/results/gpu
#   LIMIT    seconds until everything is ended. Default: 460
#   CASES    the cases, one a line. Default: all of benchmarks/gpu.py. CASE@FLAG=VALUE sets one of XLA's flags, and
#            CASE@base takes the package from the folder BASE, to compare with.
#   SMALL=1  small networks, to try the script on a CPU.
set -u
cd "$(dirname "$0")/.."
began=$SECONDS
out=${OUT:-benchmarks/results/gpu}
limit=${LIMIT:-460}
mkdir -p "$out"
rm -f "$out"/*.ready "$out"/go

needed="import jax, flax, optax, torch, jaxtyping"
on_gpu="$needed; assert jax.default_backend() == 'gpu'"
[ -n "${SMALL:-}" ] && on_gpu=$needed
python=${PYTHON:-python3}
if ! "$python" -c "$on_gpu" 2>/dev/null; then
  jax='jax[cuda13]'
  [ -n "${SMALL:-}" ] && jax=jax
  echo "making an environment with $jax and PyTorch, since $python has not all of them"
  python3 -m venv "$out/environment" && python="$out/environment/bin/python" &&
    "$python" -m pip install -q -e . "$jax" torch || exit 1
fi
export PYTHONPATH="$PWD${PEERS:+:$PEERS}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1
export BENCHMARK_DTYPE=bfloat16 XLA_PYTHON_CLIENT_PREALLOCATE=false OMP_WAIT_POLICY=passive
[ -n "${SMALL:-}" ] && export BENCHMARK_DTYPE=float32
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

names=${CASES:-$("$python" -c "from benchmarks import gpu; print(*gpu.CASES, sep='\n')")}
number=0
while read -r name; do
  file=$(echo "$name" | sed 's/[^A-Za-z0-9.-]/_/g')
  platforms=cuda,cpu
  case $name in */PyTorch*) platforms=cpu ;; esac
  [ -n "${SMALL:-}" ] && platforms=cpu
  flags=${XLA_FLAGS:-} path=$PYTHONPATH
  case $name in
    *@base) path="$BASE:$PYTHONPATH" ;;
    *@*) flags="$flags --${name#*@}" ;;
  esac
  if [ "$name" = ceilings ]; then  # First, and by itself.
    JAX_PLATFORMS=$platforms timeout 90 "$python" -m benchmarks gpu "$name" "$out" >"$out/$file.log" 2>&1
    rm -f "$out/$file.ready"
    continue
  fi
  JAX_PLATFORMS=$platforms XLA_FLAGS=$flags PYTHONPATH=$path "$python" -m benchmarks gpu "$name" "$out" >"$out/$file.log" 2>&1 &
  number=$((number + 1))
done <<<"$names"

# Nothing is measured while programs are compiled, unless they take too long.
while [ "$(ls "$out" | grep -c '\.ready$')" -lt "$number" ] && [ $((SECONDS - began)) -lt $((limit * 6 / 10)) ]; do
  sleep 0.5
done
echo "compiled after $((SECONDS - began)) s"
touch "$out/go"
while [ -n "$(jobs -rp)" ] && [ $((SECONDS - began)) -lt "$limit" ]; do sleep 0.5; done
for job in $(jobs -rp); do kill "$job"; done
wait
JAX_PLATFORMS=cpu "$python" -m benchmarks gpu report "$out"
rm -rf "$out"/trace-* "$out"/*.ready "$out"/place-* "$out/go" "$out/lock"
echo "all after $((SECONDS - began)) s"

#!/usr/bin/env bash
# Build the wheel, install it beside the core dependencies alone, and run every embedded recipe that needs no more from an
# empty folder.
# Usage: maintainers/wheel_test.sh PYTHON, whose environment holds build and hatchling.
set -euo pipefail
python=$(realpath -s "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH="$root/tests/offline"

cd "$root"
"$python" -m build --no-isolation --outdir "$work/dist" . >"$work/build.log" || { cat "$work/build.log"; exit 1; }
"$python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >"$work/core.txt"
"$python" -m venv "$work/env"
env -u PYTHONPATH "$work/env/bin/pip" install --quiet -c constraints.txt "$(grep '^torch==' constraints.txt)"
env -u PYTHONPATH "$work/env/bin/pip" install --quiet -c constraints.txt -r "$work/core.txt"
env -u PYTHONPATH "$work/env/bin/pip" install --quiet --no-deps "$work"/dist/*.whl

mkdir "$work/empty" && cd "$work/empty"
run() { echo "+ lightning-iclr $*"; "$work/env/bin/lightning-iclr" "$@"; }
"$work/env/bin/python" - "$root" "$work"/dist/*.whl <<'PY'
import sys, zipfile
from pathlib import Path

import lightning_iclr

root, wheel = Path(sys.argv[1]), zipfile.ZipFile(sys.argv[2])
assert Path(sys.prefix) in Path(lightning_iclr.__file__).parents, lightning_iclr.__file__
names = set(wheel.namelist())
shipped = {f"lightning_iclr/recipes/{p.relative_to(root / 'recipes')}" for p in (root / "recipes").rglob("*.yaml")}
shipped |= {f"lightning_iclr/embedded/{p.name}" for p in (root / "lightning_iclr/embedded").iterdir() if p.is_file()}
assert shipped <= names, sorted(shipped - names)
assert any(name.endswith("licenses/LICENSE") for name in names)
PY
run recipes
(cd "$root/recipes" && grep -l '^# data: embedded ([^)]*)$' ./*/*.yaml | sed 's/^..//; s/.yaml$//' | sort) >embedded.txt
test "$(wc -l <embedded.txt)" -ge 11
run recipes | grep -E ' embedded \([^)]*\)  ' | sed 's/ .*//' | diff - embedded.txt
while read -r recipe; do
    fast=(--trainer.limit_val_batches 1 --trainer.limit_test_batches 2 --trainer.default_root_dir "$recipe"
        --trainer.enable_progress_bar false)
    case $recipe in  # a federated round cannot be cut
        fedopt/*) fast+=(--trainer.max_epochs 2 --data.max_local_steps 2) ;;
        *) fast+=(--trainer.limit_train_batches 2 --trainer.max_steps 2 --trainer.val_check_interval 2) ;;
    esac
    run fit --config "$recipe" "${fast[@]}" </dev/null
    checkpoint=$(find "$recipe" -name 'last.ckpt')
    run test --config "$recipe" "${fast[@]}" --ckpt_path "$checkpoint" </dev/null
    run predict --config "$recipe" "${fast[@]}" --trainer.limit_predict_batches 2 --ckpt_path "$checkpoint" </dev/null
    ! grep -q PredictionWriter "$root/recipes/$recipe.yaml" || test -n "$(find "$recipe" -name predictions.csv)"
done <embedded.txt
echo "wheel test passed: $(wc -l <embedded.txt) recipes"

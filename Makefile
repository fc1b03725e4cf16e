# The two commands are `make demo` and `make test`. Everything is installed into .venv and built into target.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
BROKER := $(CURDIR)/target/release/luna-broker
FEATURES := torch,cli
WITHOUT_TORCH := $(CURDIR)/target/release/luna-broker-without-torch

# torch-sys asks the first `python` on the path where libtorch is.
export PATH := $(BIN):$(PATH)
export LIBTORCH_USE_PYTORCH := 1
export LUNA_BROKER_BIN := $(BROKER)
export LUNA_BROKER_WITHOUT_TORCH := $(WITHOUT_TORCH)
export LUNA_BROKER_EXTENSION := $(CURDIR)/python/luna_broker/_native.abi3.so
export LUNA_BROKER_GOLDEN := $(CURDIR)/target/golden
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export FEATURES

CARGO := cargo

.PHONY: demo test test-long test-rust test-python test-examples test-windows bench lint build without-torch extension golden clean
.PHONY: gpu-artifacts gpu-check test-gpu-check test-comfyui comfyui-path

demo: build extension
	$(BIN)/python examples/demo/main.py --broker $(BROKER) $(if $(VAE),--vae $(VAE)) $(if $(IMAGE),--image $(IMAGE))

# Stages print their time; what cannot run here says why.
test: $(VENV)/.test
	@bash tests/stages.sh lint build test-rust test-examples extension test-python test-gpu-check test-demo \
		test-windows

test-long: $(VENV)/.test
	@bash tests/stages.sh build extension test-rust-long bench

bench: build extension $(VENV)/.test
	$(BIN)/python benches/compare.py --broker $(BROKER)
	$(BIN)/python benches/steady_state.py --broker $(BROKER)
	$(BIN)/python benches/attach.py --broker $(BROKER)
	$(CARGO) bench --quiet --features $(FEATURES) --bench remote_call
	$(CARGO) bench --quiet --features $(FEATURES) --bench weights_load
	$(CARGO) bench --quiet --features $(FEATURES) --bench unet_steps

build: $(VENV)/.run
	$(CARGO) build --release --features $(FEATURES)

# For the test of what such a broker needs. The binary that all other tests use is put back.
without-torch: $(VENV)/.run
	$(CARGO) build --release --features cli
	cp -f $(BROKER) $(WITHOUT_TORCH)
	$(CARGO) build --release --features $(FEATURES)

extension: $(VENV)/.run
	cd python && $(BIN)/maturin develop --profile wheel --quiet

test-rust: without-torch extension $(VENV)/.test golden
	@bash tests/cargo_test.sh --features $(FEATURES)

test-rust-long: $(VENV)/.test
	@LUNA_BROKER_SOAK_REQUESTS=10000 LUNA_BROKER_FUZZ_CASES=5000 \
		bash tests/cargo_test.sh --features $(FEATURES) --test soak --test hostile

test-examples: build extension $(VENV)/.test
	$(CARGO) run --release --quiet --features $(FEATURES) --example embed_broker
	$(CARGO) run --release --quiet --features $(FEATURES) --example decode
	$(CARGO) run --release --quiet --features $(FEATURES) --example attach
	$(CARGO) build --release --quiet --features $(FEATURES) --example txt2img
	$(BIN)/python tests/txt2img_program.py target/release/examples/txt2img
	$(BIN)/python examples/attach_diffusers.py
	$(BIN)/python examples/attach_transformers.py

test-python: extension $(VENV)/.test
	cd python && OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -rs tests

# A real ComfyUI, headless, with the nodes and a broker; see CONTRIBUTING.md.
test-comfyui: comfyui-path build extension $(VENV)/.test
	$(BIN)/python -m pytest -q -rs tests/comfyui

comfyui-path:
	@test -n "$$COMFYUI_PATH" || { echo "COMFYUI_PATH is not set, so nothing was tested: set it to a checkout of ComfyUI" \
		"0.3.64 and COMFYUI_PYTHON to a Python that has its requirements. See CONTRIBUTING.md." >&2; exit 1; }

.PHONY: test-demo test-rust-long
test-demo: build extension
	$(BIN)/python examples/demo/main.py --broker $(BROKER) --out target/demo-out

test-windows:
	@bash tests/windows/run.sh --install

# For a machine that has a GPU and no Rust; see CONTRIBUTING.md.
gpu-artifacts: $(VENV)/.run
	$(BIN)/python tests/gpu_check/artifacts.py --out target/gpu-artifacts

gpu-check:
	$(PYTHON) tests/gpu_check/main.py --artifacts target/gpu-artifacts --out benches/results

# The check itself, as far as it goes without a GPU.
test-gpu-check: build extension $(VENV)/.test
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q tests/gpu_check
	$(BIN)/python tests/gpu_check/artifacts.py --in-place --out target/gpu-trial/artifacts
	$(BIN)/python tests/gpu_check/main.py --substitute --artifacts target/gpu-trial/artifacts --out target/gpu-trial

golden: $(VENV)/.test
	@$(BIN)/python tests/golden/make_vae.py $(LUNA_BROKER_GOLDEN)
	@$(BIN)/python tests/golden/make_unet.py $(LUNA_BROKER_GOLDEN)
	@$(BIN)/python tests/golden/make_clip.py $(LUNA_BROKER_GOLDEN)/clip
	@$(BIN)/python tests/golden/make_clip_lora.py $(LUNA_BROKER_GOLDEN)/clip
	@$(BIN)/python tests/golden/make_lora.py $(LUNA_BROKER_GOLDEN)
	@$(BIN)/python tests/golden/make_peft.py $(LUNA_BROKER_GOLDEN)
	@$(BIN)/python tests/golden/make_pipeline.py $(LUNA_BROKER_GOLDEN)

lint: $(VENV)/.test
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	$(CARGO) clippy --release --features $(FEATURES) --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --no-deps --quiet
	$(BIN)/ruff check --quiet python examples benches tests
	$(BIN)/ruff format --check --quiet python examples benches tests

$(VENV)/.run: python/requirements/run.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(VENV)/.test: python/requirements/test.txt $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

clean:
	rm -rf target $(VENV) demo-out

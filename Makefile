# Every target sets up what it needs in .venv; a second call finds it ready.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/ready
export OMP_NUM_THREADS ?= 1
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.torch_extensions

PORTRAIT ?= data_samples/portraits/mira.png
AUDIO ?= data_samples/speech/en-us.flac
OUT ?= out/demo.mp4

.PHONY: help demo app test test-slow lab export notebooks readme setup clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3,11) or sys.exit("midas_ref needs Python 3.11 or newer (tested: 3.11, 3.12), but $(PYTHON) is %d.%d; choose another with: make PYTHON=python3.12 test" % v)'
	@echo "Setting up .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all]' -c constraints.txt
	@touch $@

demo: $(READY)  ## a talking video in out/demo.mp4 (PORTRAIT=me.png AUDIO=me.wav OUT=me.mp4 for your own)
	@mkdir -p $(dir $(OUT))
	@env -u OMP_NUM_THREADS $(BIN)/midas-ref animate "$(PORTRAIT)" "$(AUDIO)" -o "$(OUT)" $(ARGS)

setup: $(READY)  ## make the environment in .venv

test: $(READY)  ## every check: lint, every page top to bottom, pytest
	$(BIN)/ruff check .
	$(BIN)/nbdev-test --n-workers $(WORKERS) --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(READY)  ## the longer proofs of the pages as well
	$(BIN)/nbdev-test --n-workers $(WORKERS) --timing --flags slow

app: $(READY)  ## the live demo in a browser (settings.ini says where, and which model)
	$(BIN)/midas-ref app

lab: $(READY)  ## open the pages in JupyterLab
	$(BIN)/jupyter lab nbs/index.ipynb --notebook-dir=.

export: $(READY)  ## write midas_ref/ from the pages, and tidy their metadata
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

notebooks: $(READY)  ## re-execute pages in place (NB=nbs/00_config.ipynb for one)
	$(BIN)/python tools/pages.py run $(NB)
	$(BIN)/nbdev-clean

readme: $(READY)  ## make README.md from nbs/index.ipynb
	$(BIN)/python tools/pages.py readme

clean:  ## remove the environment and what was built
	rm -rf .venv .torch_extensions .pytest_cache .ruff_cache *.egg-info

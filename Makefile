# Needs python3 and make, nothing else. Every target installs what it needs into .venv, once.
.PHONY: quickstart sweeps mail real-data real-sources benchmark cards test quality style docs install clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CARDS := auto bvg_ls imbalance_two_stages label_map layer_decay lp_ft mail_char_noise mail_hard_ham mail_label_map noise rgn subclass
export HF_HUB_OFFLINE ?= 1

quickstart: $(VENV)/experiments  ## score, tune and compare on the shipped images: about 3 minutes on 2 cores
	$(BIN)/surgical-peft quickstart

mail: install  ## fetch the mails and the text encoder and train the source model, into data/mail: about 5 minutes on 2 cores
	$(BIN)/python recipes/mail/make_data.py

data/mail/minilm-spam/measured.json:
	$(MAKE) mail

CIFAR ?= uoft-cs/cifar10
GSM8K ?= openai/gsm8k
REAL := data/real

# A Hub id needs the network: make real-data HF_HUB_OFFLINE=0. Else a folder: make real-data CIFAR=FOLDER GSM8K=FOLDER.
real-data: install  ## models and data of recipes/real, into data/real: about 30 minutes on 1 core, 250 MB to fetch
	$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt gguf onnx
	$(BIN)/python benchmarks/real_models.py $(REAL)
	$(BIN)/python recipes/real/make_gsm8k.py $(GSM8K) $(REAL)
	$(BIN)/python recipes/real/make_cifar10.py $(CIFAR) $(REAL)

real-sources: real-data  ## train the source model ViT-S/14 of recipes/real: about 2 hours on 1 core, goes on where it stopped
	$(BIN)/python recipes/real/make_vit_s14.py $(REAL)

benchmark: real-data  ## step time and memory of every method on real weights, into benchmarks/speed: about 15 minutes on 1 core
	$(BIN)/python -m pip install --quiet --quiet --no-deps badam==1.4
	$(BIN)/python benchmarks/speed.py --models $(REAL)

sweeps: install  ## each block tuned alone on two shifts, into benchmarks/sweeps/: about 8 minutes on 2 cores
	for shift in noise label_map; do \
	  $(BIN)/surgical-peft search recipes/sweep_$$shift.yaml --jobs 2 --output benchmarks/sweeps/$$shift || exit; \
	done
	$(BIN)/python benchmarks/pictures.py

cards: install data/mail/minilm-spam/measured.json  ## train each recipe that makes one adapter, into model_cards/: about 10 minutes on 2 cores
	for name in $(CARDS); do \
	  $(BIN)/surgical-peft train recipes/$$name.yaml --output runs/$$name || exit 1; \
	  mkdir -p model_cards/$$name; \
	  cp runs/$$name/report.json runs/$$name/adapter/README.md model_cards/$$name; \
	  test ! -f runs/$$name/scores.png || cp runs/$$name/scores.png model_cards/$$name; \
	done

test: install  ## the whole test suite
	$(BIN)/python -m pytest -n auto --dist loadfile

quality: install  ## lint, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: install  ## fix what lint and format can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/docs  ## tables from benchmarks/ and the pages, into site/; a broken link is an error
	$(BIN)/python docs/results.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

install: $(VENV)/installed

# torch first: once it is there, nothing else pulls another build of it.
$(VENV)/experiments: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable ".[experiments]"
	touch $@

$(VENV)/installed: $(VENV)/experiments
	$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) quickstart site

# `make quickstart` and `make test` set everything up by themselves: in an active environment (virtualenv or
# conda) they use it, elsewhere they make .venv from requirements.txt. Both also work by hand:
# pip install -r requirements.txt, then the commands below.
ENV_ID ?= coinrun
SEED ?= 1
QUICKSTART = runs/quickstart/$(ENV_ID)__$(SEED)
PYTHON3 ?= python3
BIN := $(if $(VIRTUAL_ENV)$(CONDA_PREFIX),,.venv/bin/)
STAMP := $(if $(BIN),.venv/.installed,.installed)

PLAY = runs/play
PORT ?= 8000
OPEN ?= --open

.PHONY: play first quickstart pictures test lint format clean

play: $(STAMP) $(PLAY)/data/meta.json  ## a learned world under the arrow keys, half a minute after set-up
	$(BIN)python -m tools.play_dream --env-id coinrun --pretrain-checkpoint pretrained/coinrun-dream.pt \
		--data-dir $(PLAY)/data --port $(PORT) $(OPEN)

$(PLAY)/data/meta.json: | $(STAMP)  # frames whose latents the number keys hold
	$(BIN)python collect_expert_data.py --env-id coinrun --expert-checkpoint experts/coinrun.pt --overwrite \
		--runs-dir $(PLAY) --data-dir $(PLAY)/data \
		--num-train-frames 4096 --num-test-frames 512 --num-random-episodes 64

first: $(STAMP)  ## latents of a small world that cluster by action, in a few minutes
	PYTHON=$(BIN)python SEED=$(SEED) ./quickstart.sh FrozenLake-v1

quickstart: $(STAMP)  ## the whole of LAPO, small, on two CPU cores (about 9 minutes)
	PYTHON=$(BIN)python SEED=$(SEED) ./quickstart.sh $(ENV_ID)

pictures: $(STAMP)  ## the README's pictures, from a finished quickstart
	$(BIN)python -m tools.inspect_latents --env-id $(ENV_ID) --seed $(SEED) --runs-dir $(QUICKSTART) \
		--data-dir $(QUICKSTART)/data --num-starts 1 --overwrite
	$(BIN)python benchmark/readme_pictures.py --env-id $(ENV_ID) --seed $(SEED) --runs-dir $(QUICKSTART)

test: $(STAMP)
	$(BIN)python -m pytest tests -q -n auto

lint: $(STAMP)
	$(BIN)python -m ruff check .
	$(BIN)python -m ruff format --check .

format: $(STAMP)
	$(BIN)python -m ruff check --fix .
	$(BIN)python -m ruff format .

$(STAMP): requirements.txt
	@$(PYTHON3) -c 'import sys; sys.exit("error: this is Python %d.%d, needed is 3.11 or newer: PYTHON3=python3.12 make $(MAKECMDGOALS)" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(if $(BIN),test -x .venv/bin/python || $(PYTHON3) -m venv .venv)
	$(BIN)python -m pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf .venv .installed runs/quickstart $(PLAY)

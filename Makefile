# Two commands for people: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := demo
QUESTION := "State the final answer to the following arithmetic problem: 7 + 5 - 9 + 6 ="
export PYTHONSAFEPATH := 1

.PHONY: help demo test check install golden clean

help:
	@echo "make demo    set up, then text -> tokenizer -> shards -> pretraining on 2 ranks -> fine-tuning -> a chat -> GRPO -> report"
	@echo "make test    set up, then the whole test suite"
	@echo "make check   ruff, formatting, mypy, import-linter"
	@echo "make clean   remove .venv and what the demo made"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt .ci/install
	bash .ci/install $(PYTHON) $(VENV)
	@touch $@

demo: install
	rm -rf $(DEMO)
	$(BIN)/python -m drivetrain.launch.demo text $(DEMO)/text/text.jsonl
	$(BIN)/drivetrain tokenizer train $(DEMO)/text/text.jsonl --vocab-size 2048 --out $(DEMO)/tokenizer
	$(BIN)/drivetrain data build $(DEMO)/text/text.jsonl --tokenizer $(DEMO)/tokenizer \
	    --out $(DEMO)/shards --held-out 0.05 --licence PSF-2.0
	$(BIN)/drivetrain launch experiment=demo data.path=$(DEMO)/shards run_dir=$(DEMO)/run
	@echo; echo "A sample:"; echo
	$(BIN)/drivetrain generate $(DEMO)/run --prompt "def read_" --max-tokens 96 --temperature 0.7
	@echo; echo "Asked as in a chat, before fine-tuning:"; echo
	$(BIN)/drivetrain generate $(DEMO)/run --chat --prompt $(QUESTION) --max-tokens 48 --temperature 0
	$(BIN)/python -m drivetrain.launch.demo chat $(DEMO)/chat/questions.jsonl
	$(BIN)/drivetrain data build $(DEMO)/chat/questions.jsonl --chat --tokenizer $(DEMO)/tokenizer \
	    --out $(DEMO)/chat/shards --held-out 0.05
	$(BIN)/drivetrain launch experiment=demo_sft data.path=$(DEMO)/chat/shards \
	    model.init_from=$(DEMO)/run run_dir=$(DEMO)/sft
	@echo; echo "And after:"; echo
	$(BIN)/drivetrain generate $(DEMO)/sft --chat --prompt $(QUESTION) --max-tokens 48 --temperature 0
	$(BIN)/drivetrain launch experiment=demo_grpo model.init_from=$(DEMO)/sft run_dir=$(DEMO)/grpo
	@echo
	@$(BIN)/python -m drivetrain.launch.demo gain $(DEMO)/sft $(DEMO)/grpo
	@echo; echo "The report:"
	@$(BIN)/drivetrain report $(DEMO)/run $(DEMO)/sft $(DEMO)/grpo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/types.py
	$(BIN)/lint-imports

golden: install
	$(BIN)/python -m pytest tests/conf --update-golden

clean:
	rm -rf $(VENV) $(DEMO) .types .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

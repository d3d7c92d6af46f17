# `make` lists the targets. The first of them to need packages sets up .venv, as far as it needs;
# after that, only a changed requirements file or pyproject.toml does so again.

# TensorFlow 2.21 ends at Python 3.13.
PYTHON ?= python3 python3.13 python3.12 python3.11
VENV := .venv
RUN := $(VENV)/bin/python
CORE := $(VENV)/core.stamp
RUNTIME := $(VENV)/runtime.stamp
DEVELOPMENT := $(VENV)/development.stamp
DOCS := $(VENV)/docs.stamp
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check

# The recipe reads these from its environment, so that no character in a path means anything to it.
override AUDIO := $(value AUDIO)
override MODEL := $(value MODEL)
override OUT := $(value OUT)
export AUDIO MODEL OUT

.DEFAULT_GOAL := help
.PHONY: help transcribe web pictures test lint docs format clean

help:
	@echo 'make transcribe AUDIO=song.mp3   write the notes of a recording, or of a folder of them, as MIDI'
	@echo '                                 and as a picture; without AUDIO those of the examples'
	@echo '       MODEL=...  another model, or its folder       OUT=...  folder to write to'
	@echo '       ARGS=...   further flags: $(RUN) -m mt3_keras transcribe --help'
	@echo 'make web                         build the page that transcribes in a browser: build/web, for mt3 serve'
	@echo 'make pictures                    take the pictures of the page again that the documentation shows'
	@echo 'make test                        lint, then run all tests; ARGS=... goes to pytest'
	@echo 'make lint                        check style, types and who imports what'
	@echo 'make docs                        build the documentation: site/index.html'
	@echo 'make format                      put the code into the one style'
	@echo 'make clean                       remove .venv and caches'
	@echo 'Each sets up what it needs in .venv first; PYTHON=... picks the Python (3.11 to 3.13).'

# Where the model needs packages that are not there yet, the command ends with code 3 at once.
transcribe: check-audio $(CORE)
	@transcribe() { \
		$(RUN) -m mt3_keras transcribe "$${AUDIO:-examples}" $${MODEL:+--model "$$MODEL"} \
			$${OUT:+--output_dir "$$OUT"} --formats mid,png $(ARGS); \
	}; \
	transcribe && exit; code=$$?; test $$code = 3 && test ! -e $(RUNTIME) || exit $$code; \
	$(MAKE) --no-print-directory $(RUNTIME) && transcribe

.PHONY: check-audio
check-audio:
	@test -z "$$AUDIO" || test -e "$$AUDIO" || { echo "AUDIO must be a file or a folder: there is no $$AUDIO" >&2; exit 1; }

# Types are checked first.
web: $(CORE)
	@node --version >/dev/null 2>&1 && npm --version >/dev/null 2>&1 || { echo 'make web needs Node 20 or later, and npm' >&2; exit 1; }
	cd web && npm ci --no-audit --no-fund --loglevel=error && npm run --silent check && npm run --silent build
	$(RUN) -m export.page --out_dir build/web
	@echo 'Open it with: $(RUN) -m mt3_keras serve'

# The documentation's, of the page and of the example's notes, with the weights that are there.
pictures: web
	$(RUN) -m benchmarks.page --pictures docs

test: lint
	$(RUN) -m pytest -n 2 --dist loadfile -rs $(ARGS)

lint: $(DEVELOPMENT)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

format: $(DEVELOPMENT)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) build site web/node_modules mt3_keras.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CORE): requirements.txt pyproject.toml
	@for python in $(PYTHON); do \
		$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && \
		echo 'Setting up .venv: about 0.5 GB on disk, a minute, once.' && \
		exec $$python -m venv $(VENV); \
	done; \
	echo 'Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python3.11 ...' >&2; exit 1
	@$(INSTALL) -c requirements.txt -e .
	@touch $@

$(RUNTIME): $(CORE)
	@echo 'Setting up Keras and TensorFlow in .venv: about 3 GB on disk, 2 to 5 minutes, once.'
	@$(INSTALL) -r requirements.txt
	@touch $@

$(DEVELOPMENT): requirements-dev.txt requirements-train.txt requirements-fonts.txt \
		requirements-serving.txt requirements-archives.txt requirements-spark.txt \
		requirements-score.txt $(RUNTIME)
	@echo 'Setting up the development tools in .venv.'
	@$(INSTALL) -r requirements-dev.txt
	@$(INSTALL) --no-deps -r requirements-fonts.txt
	@touch $@

# Reads the code and does not run it: needs neither Keras nor the package itself.
$(DOCS): requirements-docs.txt $(CORE)
	@echo 'Setting up the tools of the documentation in .venv.'
	@$(INSTALL) -r requirements-docs.txt
	@touch $@

PYTHON ?= python3
# Its programs are started as modules: its scripts fail in a deep folder, or in one with a space.
VENV = .venv/bin
RUN_READY = .venv/.run
READY = .venv/.dev
COMPILE = $(VENV)/python -m uv pip compile -q --upgrade --universal --python-version 3.11 \
	--generate-hashes --no-header
LESSON ?= 1
SUITES = $(basename $(subst /,.,$(wildcard test_*.py tools/test_*.py)))

help:  ## Mostra esta ajuda
	@awk -F ':.*## ' '/^##@ / { print "\n" substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

##@ Usar

up:  ## Constrói a imagem e inicia os três serviços no Docker
	docker compose up -d --build --wait

logs:  ## Mostra os logs dos três
	docker compose logs

down:  ## Encerra tudo no Docker: remove os contêineres e mantém os volumes
	docker compose down

run: $(RUN_READY)  ## Sem Docker: inicia Redis, Postgres e o contador (PORT=8000 muda a porta)
	@$(VENV)/python -m tools run

##@ Aula

demo:  ## Mostra a aula no terminal: cada Enter executa o próximo comando (LESSON=2, LESSON=3: as outras)
	@$(PYTHON) tools/documents.py demo $(LESSON)

##@ Desenvolver

# Each module of tests in a process of its own, all at once: most of their time they wait.
test: $(READY)  ## Executa os testes que dispensam o Docker (TESTS=test_server.TestAnswers: uma parte)
	@printf '%s\n' $(or $(TESTS),$(SUITES)) | xargs -n 1 -P 8 $(VENV)/python -m unittest -q

coverage: $(READY)  ## Executa os testes e mostra as linhas por onde nenhum passa
	@$(VENV)/python -m coverage erase
	@$(VENV)/python -m coverage run -m unittest $(TESTS)
	@$(VENV)/python -m coverage combine -q
	@$(VENV)/python -m coverage report

test-docker:  ## Executa no Docker os comandos dos textos e compara o que mostram
	@$(PYTHON) tools/documents.py test docker

test-swarm:  ## O mesmo com swarm/README.md: requer um Docker que não faça parte de um Swarm
	@$(PYTHON) tools/documents.py test swarm

lint: $(READY)  ## Verifica o estilo, os tipos, as versões fixadas e a CI
	@$(VENV)/python -m ruff check .
	@$(VENV)/python -m ruff format --check .
	@$(VENV)/python -m mypy
	@$(VENV)/python -m tools.pins
	@$(VENV)/zizmor --offline --no-progress --quiet .github

bench: $(READY)  ## Mede o serviço em comparação com a versão da descrição e com o waitress puro
	@$(VENV)/python -m tools bench

picture: $(READY)  ## Refaz a figura do README: executa o primeiro bloco no Docker e desenha o terminal
	@$(VENV)/python -m tools.picture

lock: $(READY)  ## Fixa as versões mais novas que pyproject.toml aceita
	$(COMPILE) -o requirements.txt pyproject.toml
	$(COMPILE) -c requirements.txt --group run -o tools/requirements-run.txt
	$(COMPILE) -c requirements.txt -c tools/requirements-run.txt --group dev \
		-o tools/requirements-dev.txt

clean:  ## Apaga o ambiente virtual e os caches; os dados de make run ficam em .dados
	rm -rf .venv .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	@if [ -d .dados ]; then echo "O contador de make run continua em .dados; para apagá-lo: rm -r .dados"; fi

# Made anew whenever a pinned version changes; a failed installation leaves no marker behind.
$(RUN_READY): requirements.txt tools/requirements-run.txt
	@$(PYTHON) tools/install.py $@ $^

$(READY): $(RUN_READY) tools/requirements-dev.txt
	@$(PYTHON) tools/install.py $@ $(filter %.txt,$^)

.PHONY: help up logs down run demo test coverage test-docker test-swarm lint bench picture lock clean

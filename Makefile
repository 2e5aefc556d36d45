PYTHON ?= python3
VENV = .venv/bin
READY = .venv/.pronto

help:  ## Mostra esta ajuda
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(READY)  ## Inicia Redis, Postgres e o contador, sem Docker (PORT=8000 muda a porta)
	@$(VENV)/python local.py

test: $(READY)  ## Executa os testes, sem Docker
	@$(VENV)/python -m unittest

test-docker:  ## Executa os comandos do README no Docker e compara o que mostram
	@$(PYTHON) readme.py test

test-swarm:  ## Executa os comandos de "Além de uma máquina": requer um Docker Swarm só para isto
	@$(PYTHON) readme.py test swarm

demo:  ## Mostra a aula, um comando a cada Enter
	@$(PYTHON) readme.py demo

bench: $(READY)  ## Mede o serviço nesta máquina, contra o waitress sozinho
	@$(VENV)/python bench.py

lint: $(READY)  ## Verifica o estilo e os tipos
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/mypy

lock: $(READY)  ## Fixa de novo as versões, depois de mudar pyproject.toml
	$(VENV)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header -o requirements.txt pyproject.toml
	$(VENV)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header -c requirements.txt \
		--group dev -o requirements-dev.txt

up:  ## Constrói e inicia tudo no Docker
	docker compose up -d --build --wait

down:  ## Para tudo no Docker; o contador fica no volume
	docker compose down

logs:  ## Mostra os logs do Docker
	docker compose logs

clean:  ## Apaga o ambiente virtual e os dados de make run
	rm -rf .venv .dados .hypothesis .mypy_cache .ruff_cache __pycache__

# Made anew whenever a pinned version changes; a failed installation leaves no marker behind.
$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "É preciso Python 3.11 ou mais novo; se houver outro: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(VENV)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.txt -r requirements-dev.txt
	@touch $@

.PHONY: help run test test-docker test-swarm demo bench lint lock up down logs clean

PYTHON ?= python3
LESSON ?= 1
VENV = .venv/bin/python
# A person's PIP_USER=1, or its like in pip.conf, is not for a virtual environment.
INSTALL = PIP_USER=0 $(VENV) -m pip install -q --disable-pip-version-check --require-hashes
COMPILE = $(VENV) -m uv pip compile -q --upgrade --universal --python-version 3.11 \
	--generate-hashes --no-header

# Without the Python that it was made with, an environment is made anew.
$(shell test ! -e .venv || $(VENV) -c 'import pip' 2>/dev/null || rm -rf .venv)

help:  ## Mostra esta ajuda
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

up:  ## Constrói a imagem e sobe os três serviços no Docker
	docker compose up -d --build --wait

logs:  ## Mostra os logs dos três
	docker compose logs

down:  ## Derruba tudo no Docker; os volumes ficam
	docker compose down

run: .venv/.run  ## Sem Docker: sobe os três (outra porta: make run PORT=8000)
	@$(VENV) -m tools.run

demo:  ## Mostra a aula 1, um comando a cada Enter (outra: make demo LESSON=2)
	@$(PYTHON) tools/demo.py $(LESSON)

test: .venv/.run  ## Testa o serviço e os comandos dos textos que dispensam o Docker
	@$(VENV) -m unittest -c -q test_server tools.test_run tools.test_documents

test-docker: .venv/.run  ## Roda no Docker os comandos dos textos e compara o que mostram
	@DOCUMENTS=docker $(VENV) -m unittest -c -f -v tools.test_documents

test-swarm: .venv/.run  ## O mesmo com os textos do Swarm; o Docker não pode estar em um
	@DOCUMENTS=swarm $(VENV) -m unittest -c -f -v tools.test_documents

lint: .venv/.dev  ## Verifica o estilo e os tipos
	@$(VENV) -m ruff check .
	@$(VENV) -m ruff format --check .
	@$(VENV) -m mypy

bench: .venv/.dev  ## Mede o serviço, o mesmo em threads e o Flask do enunciado
	@$(VENV) -m tools.bench

lock: .venv/.dev  ## Fixa as versões mais novas que pyproject.toml aceita
	$(COMPILE) -o requirements.txt pyproject.toml
	$(COMPILE) -c requirements.txt --group run -o tools/requirements.txt
	$(COMPILE) -c requirements.txt -c tools/requirements.txt --group dev \
		-o tools/requirements-dev.txt

clean:  ## Apaga o ambiente virtual e os caches; o contador de make run fica em .dados
	rm -rf .venv .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# A file tells that the packages are there. Programs are started as modules: pip's scripts fail in
# a deep folder, or in one with a space.
.venv/.run: requirements.txt tools/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"É preciso Python 3.11 ou mais novo; se houver outro: make PYTHON=python3.12 ...")'
	@echo "Instalando os pacotes em .venv..."
	@$(PYTHON) -m venv --clear .venv
	@$(INSTALL) -r requirements.txt -r tools/requirements.txt
	@touch $@

.venv/.dev: .venv/.run tools/requirements-dev.txt
	@echo "Instalando os pacotes de desenvolvimento em .venv..."
	@$(INSTALL) -r tools/requirements-dev.txt
	@touch $@

.PHONY: help up logs down run demo test test-docker test-swarm lint bench lock clean

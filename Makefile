PYTHON ?= python3
LESSON ?= 1
VENV = .venv/bin/python
# A person's own settings may send packages elsewhere, or bring other ones in.
INSTALL = $(VENV) -m pip install -q --disable-pip-version-check --require-hashes \
	--no-user --target= --prefix="$(CURDIR)/.venv"
unexport PYTHONPATH
COMPILE = $(VENV) -m uv pip compile -q --upgrade --universal --python-version 3.11 \
	--generate-hashes --no-header
CHECK_VERSION = import sys; sys.exit(sys.version_info < (3, 11) and \
	"É preciso Python 3.11 ou mais novo; se já tiver um, use make PYTHON=python3.12 ...")

help:  ## Mostra esta ajuda
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

up:  ## Constrói a imagem e sobe os três serviços no Docker
	docker compose up -d --build --wait

logs:  ## Mostra os logs dos três
	docker compose logs

down:  ## Remove os contêineres e as redes; os dados, nos volumes, ficam
	docker compose down

run: .venv/.run  ## Sem Docker: sobe os três (outra porta: make run PORT=8000)
	@id -un >/dev/null 2>&1 || { \
		echo "O Postgres não roda com um usuário sem nome. Use o Docker: make up" >&2; exit 1; }
	@$(VENV) -m tools.run

demo:  ## Mostra a aula 1, um comando a cada Enter (outra: make demo LESSON=2)
	@$(PYTHON) tools/demo.py $(LESSON)

test: .venv/.run  ## Testa o serviço e os comandos dos textos que dispensam o Docker
	@$(VENV) -m unittest -c -q test_server tools.test_run tools.test_documents

test-docker: .venv/.run  ## Roda no Docker os comandos dos textos e compara o que mostram
	@DOCUMENTS=docker $(VENV) -m unittest -c -f -v tools.test_documents

test-swarm: .venv/.run  ## Roda os do Swarm; o Docker não pode já fazer parte de um
	@DOCUMENTS=swarm $(VENV) -m unittest -c -f -v tools.test_documents

lint: .venv/.dev  ## Verifica o estilo e os tipos
	@$(VENV) -m ruff check .
	@$(VENV) -m ruff format --check .
	@$(VENV) -m mypy

bench: .venv/.dev  ## Compara o serviço com o waitress em threads e com o Flask do enunciado
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
.venv/.run: .venv/bin/python requirements.txt tools/requirements.txt
	@$(VENV) -c 'import pip; $(CHECK_VERSION)' 2>/dev/null || { \
		$(PYTHON) -c '$(CHECK_VERSION)' && $(PYTHON) -m venv --clear .venv; }
	@echo "Instalando os pacotes em .venv..."
	@$(INSTALL) -r requirements.txt
	@$(INSTALL) --only-binary=:all: -r tools/requirements.txt 2>.venv/errors || { \
		cat .venv/errors; \
		! grep -q Retrying .venv/errors && grep -q "No matching distribution" .venv/errors && \
		echo "Esse pacote não existe para este computador. Use o Docker: make up"; \
		exit 1; } >&2
	@$(VENV) -c 'import pg8000, redis, sybil, waitress, tools.servers'
	@touch $@

# Where the Python that it was made with is gone, the environment is made anew.
.venv/bin/python: ;

.venv/.dev: .venv/.run tools/requirements-dev.txt
	@echo "Instalando os pacotes de desenvolvimento em .venv..."
	@$(INSTALL) -r tools/requirements-dev.txt
	@touch $@

.PHONY: help up logs down run demo test test-docker test-swarm lint bench lock clean

FROM python:3.14-alpine

WORKDIR /app

# O que muda pouco vem antes: enquanto requirements.txt for o mesmo, esta camada não é refeita.
COPY requirements.txt .
RUN pip install --no-cache-dir --only-binary :all: --require-hashes -r requirements.txt

COPY server.py ./
COPY contador contador/
# Em um projeto clonado com umask 077, só o dono dos arquivos poderia ler o programa.
RUN chmod -R a+rX . && python -m compileall -q .

# Um número, não um nome: quem orquestra consegue ver que não é o root.
USER 10001:10001
EXPOSE 5000
# /health pergunta também ao Redis e ao Postgres: web só está bem com os dois. Sem o proxy (-Y off)
# que o Docker de muitas universidades põe em cada contêiner.
HEALTHCHECK --interval=3s --timeout=3s --start-period=1m --start-interval=1s \
    CMD ["sh", "-c", "wget -Y off -q -O - http://127.0.0.1:${PORT:-5000}/health"]
CMD ["python", "server.py"]

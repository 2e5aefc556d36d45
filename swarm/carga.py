"""Visita todas as réplicas de web e confere as respostas: python - SEGUNDOS < swarm/carga.py"""

import http.client
import random
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

numbers: list[int] = []
lost: list[str] = []


def replicas() -> list[str]:
    found = socket.getaddrinfo("tasks.web", 5000, socket.AF_INET)
    return [str(each[4][0]) for each in found]


def ready(address: str) -> bool:
    try:
        connection = http.client.HTTPConnection(address, 5000, timeout=3)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def visits(_: int) -> None:
    while time.monotonic() < end:
        connection = http.client.HTTPConnection(random.choice(replicas()), 5000, timeout=3)
        try:
            connection.connect()
        except OSError:
            continue  # esta réplica já saiu, ou ainda não chegou: nada foi pedido a ela
        try:
            connection.request("GET", "/")
            numbers.append(int(connection.getresponse().read().split()[1]))
        except (OSError, http.client.HTTPException, ValueError) as error:
            lost.append(repr(error))
        connection.close()


while not all(map(ready, replicas())):
    time.sleep(0.2)
end = time.monotonic() + float(sys.argv[1])
with ThreadPoolExecutor(4) as pool:
    list(pool.map(visits, range(4)))
repeated = len(numbers) - len(set(numbers))
print(f"{len(numbers)} respostas, {repeated} números repetidos, {len(lost)} perdidas", *lost[:3])

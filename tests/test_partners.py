"""Processes of a distributed run meet and watch each other; here each is a thread with sockets."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime import partners
from nonlocal_jax.runtime.parallel import find_place
from nonlocal_jax.runtime.partners import Partners, Place
from tests.conftest import free_port

HOST = socket.gethostname()
TIMEOUT = 1.2


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """Signs of life come as often as a timeout of seconds in place of half a minute asks for."""
  monkeypatch.setattr(partners, '_BEAT_SECS', 0.1)
  monkeypatch.setattr(partners, '_RETRY_SECS', 0.05)


@pytest.fixture
def coordinator():
  return f'localhost:{free_port()}'


def run(*processes) -> list[object]:
  """Calls functions at the same time; returns what each returns or the error that it raises."""

  def result(process):
    try:
      return process()
    except UserError as error:
      return str(error)

  with ThreadPoolExecutor(len(processes)) as pool:
    return list(pool.map(result, processes))


def process(place: Place, then=lambda partners: None, *, delay: float = 0):
  """A process that meets the others and then does something."""

  def start():
    time.sleep(delay)
    partners = Partners(place, TIMEOUT)
    partners.meet()
    return then(partners)

  return start


def watch(partners: Partners) -> str:
  """What a process says when the run ends, and for everybody."""
  while (reason := partners.poll(0.05)) is None:
    pass
  partners.leave(reason)
  return reason


def run_to_the_end(seconds: float):
  def go(partners: Partners) -> str | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      if (reason := partners.poll(0.05)) is not None:
        return reason
    partners.leave(None)
    return None

  return go


def vanish(partners: Partners) -> str:
  """What the system does with the connections of a process that is killed."""
  for connection in partners._connections:
    connection.socket.close()
  return 'killed'


def test_those_that_come_to_their_end_leave_in_any_order(coordinator):
  lengths = (0.3, 0.6, 1.2)
  places = [Place(coordinator, 3, index) for index in range(3)]
  delays = (0.3, 0, 0.1)  # of their starts
  assert run(
    *(
      process(place, run_to_the_end(length), delay=delay)
      for place, length, delay in zip(places, lengths, delays, strict=True)
    )
  ) == [None, None, None]


@pytest.mark.parametrize('index', [0, 1])
def test_a_process_that_never_came_is_named_everywhere(index, coordinator):
  said = run(*(process(Place(coordinator, 3, i)) for i in (0, 1, 2) if i != index))
  if index:
    expected = f'process 1 of 3 did not come to {coordinator} within 1.2 s; run the same command '
  else:
    expected = f'process 0 was not found at {coordinator} within 1.2 s (Connection refused); run '
  assert [reason[: len(expected)] for reason in said] == [expected] * 2


def test_a_wrong_address_is_named():
  place = Place('nowhere.invalid:1234', 2, 1)
  [said] = run(process(place))
  assert said.startswith('process 0 was not found at nowhere.invalid:1234 within 1.2 s (')
  for text in ('localhost', 'localhost:x', ':1234', 'localhost:99999'):
    with pytest.raises(UserError, match='it must be HOST:PORT, as in node1:1234'):
      Partners(Place(text, 2, 1), TIMEOUT).meet()


def test_other_numbers_of_processes_are_named_everywhere(coordinator):
  said = run(process(Place(coordinator, 2, 0)), process(Place(coordinator, 3, 1)))
  assert (
    said
    == [
      f'process 1 ({HOST}) was started with --processes=3, process 0 ({HOST}) with --processes=2; '
      'give all the same number.'
    ]
    * 2
  )


def test_the_same_index_twice_is_refused(coordinator):
  places = [Place(coordinator, 3, index) for index in (0, 1, 1)]
  said = run(
    *(process(place, delay=delay) for place, delay in zip(places, (0, 0, 0.5), strict=True))
  )
  assert said[2] == f'process 1 ({HOST}) has come before; give each process a --process of its own.'
  assert said[0] == said[1]
  assert said[0].startswith('process 2 of 3 did not come to')


def test_two_first_processes_do_not_share_a_port(coordinator):
  place = Place(coordinator, 2, 0)
  said = run(process(place), process(place, delay=0.2))
  assert said[1].startswith(f'port {place.address[1]} of this machine is in use, perhaps by')
  assert said[0].startswith('process 1 of 2 did not come')


def test_another_program_at_the_address_is_told(coordinator):
  """One that talks, as the service of JAX does to those that come late, and one that does not."""
  for greeting in (b'\0\0\x18\x04\0\0\0\0\0\n', b'HTTP/1.1 400 Bad Request\r\n', b''):
    with socket.create_server(('localhost', 0)) as server:
      address = f'localhost:{server.getsockname()[1]}'

      def answer(server=server, greeting=greeting):
        connection, _ = server.accept()
        with connection:
          connection.sendall(greeting)
          while connection.recv(100):
            pass

      thread = threading.Thread(target=answer)
      thread.start()
      [said] = run(process(Place(address, 2, 1)))
      thread.join()
    assert said.startswith(f'{address} is not a process 0 that waits for others')


def test_strangers_at_the_port_disturb_nobody(coordinator):
  place = Place(coordinator, 2, 0)

  def strangers():
    time.sleep(0.3)
    for data in (b'GET / HTTP/1.1\r\n\r\n', b'{"hello": "x"}\n', b'[1]\n{}\n', b'', bytes(200_000)):
      with socket.create_connection(place.address) as connection:
        connection.sendall(data)
    return process(Place(coordinator, 2, 1), run_to_the_end(0.2))()

  assert run(process(place, run_to_the_end(0.2)), strangers) == [None, None]


@pytest.mark.parametrize('lost', [0, 1, 2])
def test_a_process_that_is_killed_is_named_at_once(lost, coordinator):
  places = [Place(coordinator, 3, index) for index in range(3)]
  started = time.monotonic()
  said = run(*(process(place, vanish if place.process == lost else watch) for place in places))
  host = 'localhost' if lost == 0 else HOST  # the others know the first by its address
  expected = f'process {lost} ({host}) is gone: it was killed, or its machine was.'
  assert said == [expected if index != lost else 'killed' for index in range(3)]
  assert time.monotonic() - started < TIMEOUT


@pytest.mark.parametrize('silent', [0, 1])
def test_a_process_that_hangs_is_named_and_told(silent, coordinator):
  def hang(partners: Partners) -> str:
    time.sleep(2 * TIMEOUT)
    return watch(partners)

  places = [Place(coordinator, 3, index) for index in range(3)]
  said = run(*(process(place, hang if place.process == silent else watch) for place in places))
  host = 'localhost' if silent == 0 else HOST
  assert set(said) == {f'process {silent} ({host}) has not answered for 1.2 s.'}


def test_a_process_that_hangs_for_a_moment_goes_on(coordinator):
  def pause(partners: Partners) -> str | None:
    time.sleep(TIMEOUT / 2)
    return run_to_the_end(TIMEOUT)(partners)

  places = [Place(coordinator, 2, index) for index in range(2)]
  assert (
    run(process(places[0], run_to_the_end(2 * TIMEOUT)), process(places[1], pause)) == [None] * 2
  )


@pytest.mark.parametrize('failing', [0, 1])
def test_why_a_process_failed_is_said_everywhere(failing, coordinator):
  def fail(partners: Partners) -> str:
    reason = f'{partners.name} failed: no images in data.'
    partners.leave(reason)
    return reason

  places = [Place(coordinator, 3, index) for index in range(3)]
  said = run(*(process(place, fail if place.process == failing else watch) for place in places))
  assert said == [f'process {failing} ({HOST}) failed: no images in data.'] * 3


def test_the_address_is_free_for_jax_once_all_are_there(coordinator):
  """And the next run can listen there when this one has ended."""

  def listen(partners: Partners) -> None:
    address = ('', partners.place.address[1])
    with socket.create_server(address, reuse_port=True):
      time.sleep(0.1)
    run_to_the_end(0.1)(partners)

  for _ in range(2):
    places = [Place(coordinator, 2, index) for index in range(2)]
    assert run(process(places[0], listen), process(places[1], run_to_the_end(0.3))) == [None, None]


def test_a_place_is_given_or_detected(monkeypatch):
  for name in ('SLURM_JOB_ID', 'OMPI_MCA_orte_hnp_uri', 'JAX_COORDINATOR_ADDRESS'):
    monkeypatch.delenv(name, raising=False)
  assert find_place('a:1', 3, 2) == Place('a:1', 3, 2)
  with pytest.raises(UserError, match=r'not detected: give coordinator \(HOST:PORT of the first\)'):
    find_place(None, None, None)
  with pytest.raises(UserError, match='process is 3; of 3 it must be one from 0'):
    find_place('a:1', 3, 3)
  variables = {
    'SLURM_JOB_ID': '4242',
    'SLURM_STEP_NODELIST': 'node[3-4]',
    'SLURM_NTASKS': '8',
    'SLURM_PROCID': '5',
    'SLURM_LOCALID': '1',
  }
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  found = find_place(None, None, None)
  assert (found.address[0], found.processes, found.process) == ('node3', 8, 5)

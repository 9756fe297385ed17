"""Counts of n-grams: equal to a Counter's, whatever the engine, the memory and the kills on the way."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lightning_iclr.pmi_masking import engines, streams
from lightning_iclr.pmi_masking.ngrams import count_ngrams
from lightning_iclr.pmi_masking.sql_engines import DaftEngine, DuckDBEngine
from tests.pmi_masking.toys import as_dicts, assert_equal_tables, count_by_hand, largest_file, zipf_documents

ENGINES = {"numpy": engines.NumpyEngine, "duckdb": DuckDBEngine, "daft": DaftEngine}
SMALL = 4_500_000  # bytes: close to the least that is allowed, room for 70,000 positions at a time
LARGE = 250_000  # positions: several times that


@cache
def small():
    return zipf_documents(0, 6_000)


@cache
def large():
    return zipf_documents(1, LARGE, words=2000)


@cache
def large_table():
    return count_ngrams(large(), min_count=5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", [0, 1])
def test_counts_and_totals_equal_a_counter_over_all_windows(seed, engine):
    documents = zipf_documents(seed, 6_000)
    expected = count_by_hand(documents, max_n=5)
    table = count_ngrams(documents, min_count=4, engine=engine)
    frequent = [{words: count for words, count in counts.items() if count >= 4} for counts in expected]
    assert min(map(len, frequent)) > 10  # or the corpus would show little
    assert as_dicts(table) == frequent
    assert table.totals == tuple(sum(counts.values()) for counts in expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_ngrams_are_in_the_order_of_their_words(engine):
    table = count_ngrams(small(), min_count=2, engine=engine)
    for n in range(1, 6):
        words = table.ngrams(n).tolist()
        assert words == sorted(words)


def test_parents_are_the_first_and_the_last_words():
    table = count_ngrams(small(), min_count=3)
    for n in range(2, 6):
        shorter = table.ngrams(n - 1)
        np.testing.assert_array_equal(shorter[table.parents[n - 2][:, 0]], table.ngrams(n)[:, :-1])
        np.testing.assert_array_equal(shorter[table.parents[n - 2][:, 1]], table.ngrams(n)[:, 1:])


@pytest.mark.parametrize("engine", ENGINES)
def test_an_ngram_must_occur_as_often_as_min_count_and_no_more(engine):
    documents = [np.array([1, 2])] * 11 + [np.array([3, 4])] * 10  # the paper's "more than 10"
    assert as_dicts(count_ngrams(documents, max_n=2, min_count=11, engine=engine)) == [
        {(1,): 11, (2,): 11},
        {(1, 2): 11},
    ]


def test_how_a_corpus_is_cut_into_arrays_does_not_matter():
    one = np.concatenate([np.append(document, -1) for document in small()])
    table = count_ngrams(small(), min_count=3)
    assert_equal_tables(count_ngrams([one], min_count=3), table)
    assert_equal_tables(count_ngrams(iter(small()), min_count=3), table)
    assert_equal_tables(count_ngrams([document.astype(np.int64) for document in small()], min_count=3), table)


@pytest.mark.parametrize("engine", ENGINES)
def test_any_negative_number_is_a_break(engine):
    documents = [np.array([-9, 0, 1, -2, 1, 0, -(2**31)]), np.array([], np.int64), np.array([1, 0])]
    table = count_ngrams(documents, max_n=2, min_count=1, engine=engine)
    assert as_dicts(table) == [{(0,): 3, (1,): 3}, {(0, 1): 1, (1, 0): 2}]
    assert table.totals == (6, 3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_levels_may_be_empty(levels, engine):
    words = np.arange(60)
    documents = [words, words[::-1], words, words[::-1]]  # pairs occur twice, words four times
    table = count_ngrams(documents, max_n=4, min_count=(5, 4, 2)[levels], engine=engine)
    assert [len(count) for count in table.counts] == [[0, 0, 0, 0], [60, 0, 0, 0], [60, 118, 116, 114]][levels]
    assert table.ngrams(4).shape == ((0, 0, 114)[levels], 4)


def test_counting_words_alone_takes_no_pairs():
    table = count_ngrams([np.array([3, 3, 5])], max_n=1, min_count=2)
    assert (as_dicts(table), table.totals, table.parents) == ([{(3,): 2}], (3,), ())


def test_progress_is_shown_where_it_is_wanted(capsys):
    count_ngrams(small(), min_count=3)
    assert capsys.readouterr().err == ""
    count_ngrams(small(), min_count=3, progress_bar=True)
    assert "counting n-grams: 100%" in capsys.readouterr().err


@pytest.fixture
def spilled(monkeypatch):
    """Names of the files to which numbers are appended."""
    names = []

    def spy(path, numbers):
        names.append(path.parent.name + "/" + path.name if path.parent.name == "runs" else path.name)
        append(path, numbers)

    append = streams.append
    monkeypatch.setattr(streams, "append", spy)
    monkeypatch.setattr(engines, "append", spy)
    return names


@pytest.mark.parametrize("engine", ["numpy", "daft"])
def test_tables_of_a_corpus_beyond_the_memory_limit_are_equal(engine, spilled, tmp_path):
    table = count_ngrams(large(), min_count=5, memory_limit=SMALL, engine=engine, spill_dir=tmp_path / "spill")
    assert_equal_tables(table, large_table())
    assert "corpus.int32" in spilled
    if engine == "numpy":
        assert {"corpus-1.int32", "corpus-2.int32", "runs/0", "runs/1", "runs/2"} <= set(spilled)
    assert not list((tmp_path / "spill").iterdir())


def test_the_large_corpus_fits_the_memory_where_it_is_taken_for_the_reference(spilled):
    table = count_ngrams(large(), min_count=5)
    assert not spilled
    expected = count_by_hand(large(), max_n=3)
    assert as_dicts(table)[2] == {words: count for words, count in expected[2].items() if count >= 5}


def test_duckdb_agrees_on_the_large_corpus(tmp_path):
    table = count_ngrams(large(), min_count=5, engine="duckdb", spill_dir=tmp_path / "it's [here]", memory_limit="80MB")
    assert_equal_tables(table, large_table())
    assert not list((tmp_path / "it's [here]").iterdir())


@pytest.mark.slow
def test_duckdb_spills_and_its_tables_are_equal(tmp_path):
    documents = zipf_documents(2, 2_000_000, words=3000)
    files, finished = set(), threading.Event()

    def watch():
        while not finished.wait(0.01):
            files.update(path.name for path in (tmp_path / "spill" / "duckdb").glob("*"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        table = count_ngrams(documents, engine="duckdb", memory_limit="64MB", spill_dir=tmp_path / "spill")
    finally:
        finished.set()
        watcher.join()
    assert_equal_tables(table, count_ngrams(documents))
    assert files


def test_daft_spells_out_a_folder_with_signs_of_a_pattern(tmp_path):
    table = count_ngrams(small(), min_count=5, engine="daft", spill_dir=tmp_path / "a[b]*" / "it's")
    assert_equal_tables(table, count_ngrams(small(), min_count=5))


class Killed(Exception):
    pass


class Recorder:
    """Kill a run at a step of a level, and note which levels are counted."""

    def __init__(self, monkeypatch, engine):
        self.kill = None
        self.counted = []
        kind = ENGINES[engine]
        self._wrap(monkeypatch, kind, "frequent_pairs", lambda own: own.n + 1)
        self._wrap(monkeypatch, kind, "relabel", lambda own: own.n + 1)
        self._wrap(monkeypatch, kind, "forget", lambda own: own.n)
        self._wrap(monkeypatch, kind, "close", lambda own: own.n)

    def _wrap(self, monkeypatch, kind, name, level):
        inner = getattr(kind, name)

        def outer(own, *args):
            n = level(own)
            if name == "frequent_pairs":
                self.counted.append(n)
            if self.kill == ("before", name, n):
                raise Killed
            result = inner(own, *args)
            if self.kill == ("after", name, n):
                raise Killed
            return result

        monkeypatch.setattr(kind, name, outer)


KILLS = {  # where it dies, and what is left to count
    "in level 2": (("before", "frequent_pairs", 2), [2, 3, 4, 5]),
    "in level 4": (("after", "frequent_pairs", 4), [4, 5]),
    "when level 3 has new numbers that are not kept": (("after", "relabel", 3), [3, 4, 5]),
    "between 3 and 4": (("before", "forget", 3), [4, 5]),
    "in the last level": (("after", "frequent_pairs", 5), [5]),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_goes_on_after_the_last_level_that_it_finished(kill, engine, monkeypatch, tmp_path):
    recorder = Recorder(monkeypatch, engine)
    recorder.kill, rest = KILLS[kill]
    settings = dict(min_count=3, engine=engine, spill_dir=tmp_path / "spill")
    with pytest.raises(Killed):
        count_ngrams(small(), **settings)
    recorder.kill, recorder.counted = None, []
    table = count_ngrams(small(), **settings)
    assert recorder.counted == rest
    assert_equal_tables(table, count_ngrams(small(), min_count=3))
    assert not list((tmp_path / "spill").iterdir())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_is_killed_when_all_is_counted_leaves_nothing_that_misleads(engine, monkeypatch, tmp_path):
    recorder = Recorder(monkeypatch, engine)
    recorder.kill = ("after", "close", 4)
    settings = dict(min_count=3, engine=engine, spill_dir=tmp_path / "spill")
    with pytest.raises(Killed):
        count_ngrams(small(), **settings)
    recorder.kill = None
    assert_equal_tables(count_ngrams(small(), **settings), count_ngrams(small(), min_count=3))


def test_a_run_that_is_killed_while_it_writes_is_resumed_with_another_memory_limit(monkeypatch, tmp_path):
    settings = dict(min_count=5, spill_dir=tmp_path / "spill")
    append, finished = engines.append, tmp_path / "spill" / "ngrams-2.npz"

    def dying(path, numbers):
        append(path, numbers[: len(numbers) // 2])  # half a file
        if path.parent.name == "runs" and finished.exists():
            raise Killed
        append(path, numbers[len(numbers) // 2 :])

    monkeypatch.setattr(engines, "append", dying)
    with pytest.raises(Killed):
        count_ngrams(large(), memory_limit=SMALL, **settings)
    monkeypatch.undo()
    assert finished.exists()
    assert_equal_tables(count_ngrams(large(), memory_limit="1GB", **settings), large_table())
    assert not list((tmp_path / "spill").iterdir())


def test_a_half_written_table_of_a_level_is_not_read(monkeypatch, tmp_path):
    def dying(path, **arrays):
        savez(path, **{name: array[:5] for name, array in arrays.items()})
        raise Killed

    savez = np.savez
    monkeypatch.setattr(np, "savez", dying)
    with pytest.raises(Killed):
        count_ngrams(small(), min_count=3, spill_dir=tmp_path / "spill")
    monkeypatch.undo()
    table = count_ngrams(small(), min_count=3, spill_dir=tmp_path / "spill")
    assert_equal_tables(table, count_ngrams(small(), min_count=3))


def _count_and_die(folder):
    def dying(own, pairs):
        relabel(own, pairs)
        if own.n == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    relabel = engines.NumpyEngine.relabel
    engines.NumpyEngine.relabel = dying
    count_ngrams(large(), min_count=5, memory_limit=SMALL, spill_dir=folder)


def test_a_process_that_is_killed_outright_is_resumed(monkeypatch, tmp_path):
    large()
    process = multiprocessing.get_context("fork").Process(target=_count_and_die, args=(tmp_path / "spill",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    recorder = Recorder(monkeypatch, "numpy")
    table = count_ngrams(large(), min_count=5, memory_limit=SMALL, spill_dir=tmp_path / "spill")
    assert recorder.counted == [3, 4, 5]
    assert_equal_tables(table, large_table())
    assert not list((tmp_path / "spill").iterdir())


OTHERS = {
    "corpus": dict(documents=zipf_documents(9, 6_000)),
    "max_n": dict(max_n=4),
    "min_count": dict(min_count=4),
    "engine": dict(engine="duckdb"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_another_run_is_refused(name, monkeypatch, tmp_path):
    settings = dict(documents=small(), min_count=3, spill_dir=tmp_path)
    recorder = Recorder(monkeypatch, "numpy")
    recorder.kill = ("before", "frequent_pairs", 4)
    with pytest.raises(Killed):
        count_ngrams(**settings)
    with pytest.raises(ValueError, match=f"spill_dir {tmp_path} holds the counts of another run: its {name} is"):
        count_ngrams(**settings | OTHERS[name])
    recorder.kill = None
    assert_equal_tables(count_ngrams(**settings), count_ngrams(small(), min_count=3))  # still whole


@pytest.mark.parametrize(("engine", "size"), [("numpy", 200_000), ("duckdb", 1_000), ("daft", 1_000)])
def test_a_full_disk_is_reported_with_its_folder_and_a_larger_one_is_resumed(engine, size, tmp_path):
    documents = large() if engine == "numpy" else small()
    limit = SMALL if engine == "numpy" else "80MB"
    settings = dict(min_count=5, engine=engine, spill_dir=tmp_path / "spill", memory_limit=limit)
    with (
        largest_file(size),
        pytest.raises(OSError, match=f"no room .*in spill_dir, {tmp_path}/spill; give another one"),
    ):
        count_ngrams(documents, **settings)
    assert_equal_tables(count_ngrams(documents, **settings), count_ngrams(documents, min_count=5))


@pytest.mark.parametrize("engine", ["duckdb", "daft"])
def test_a_disk_that_is_full_in_a_later_level_is_reported_with_its_folder(engine, monkeypatch, tmp_path):
    kind, limits = ENGINES[engine], []
    relabel = kind.relabel

    def full(own, pairs):
        with largest_file(200):
            limits.append(own.n)
            relabel(own, pairs)

    monkeypatch.setattr(kind, "relabel", full)
    with pytest.raises(Exception, match=str(tmp_path)) as error:
        count_ngrams(small(), min_count=3, engine=engine, spill_dir=tmp_path)
    assert limits == [1]
    assert isinstance(error.value, OSError) or type(error.value).__module__ == "_duckdb"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("limit", [1000, "4MB"])
def test_a_memory_limit_that_holds_no_chunk_is_refused(limit, engine):
    with pytest.raises(ValueError, match=r"memory_limit must leave 4,194,304 bytes beside \d+ words"):
        count_ngrams(small(), engine=engine, memory_limit=limit)


def test_a_memory_limit_that_the_words_fill_is_refused_before_they_do():
    with pytest.raises(ValueError, match="beside 1,000,000,001 words, of which each takes 16, got 100,000,000"):
        count_ngrams([np.array([0, 10**9])], max_n=2, memory_limit="100MB")  # else a table of 8 GB


def test_a_memory_limit_that_is_too_small_for_duckdb_is_reported():
    with pytest.raises(ValueError, match=r"memory_limit leaves DuckDB [\d,]+ bytes, which are too few"):
        count_ngrams(large(), engine="duckdb", memory_limit=SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_n=0), "max_n must be at least 1, got 0"),
        (dict(min_count=0), "min_count must be at least 1, got 0"),
        (dict(engine="spark"), "engine must be 'numpy', 'duckdb' or 'daft', got 'spark'"),
        (dict(memory_limit="much"), "memory_limit must be a number of bytes"),
    ],
)
def test_wrong_settings_are_refused_before_the_corpus_is_read(settings, message):
    def documents():
        raise AssertionError("the corpus was read")
        yield

    with pytest.raises(ValueError, match=message):
        count_ngrams(documents(), **settings)


@pytest.mark.parametrize(
    "documents", [[], [np.arange(4)], [np.arange(4), np.arange(4)], [np.array([0, 1, 2, 3, -1, 4])]]
)
def test_a_corpus_without_so_many_words_in_a_row_is_refused(documents):
    with pytest.raises(ValueError, match="max_n is 5, and no document has so many words in a row"):
        count_ngrams(documents, max_n=5, min_count=1)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (np.array([0.0, 1.0]), r"documents must be arrays \(T,\) of integers, got float64 \(2,\)"),
        (np.zeros((2, 3), int), r"documents must be arrays \(T,\) of integers, got int64 \(2, 3\)"),
        (np.array([0, 2**31]), r"word ids must lie between -2\*\*31 and 2\*\*31, got 0 to 2147483648"),
        (np.array([-(2**32), 0]), r"word ids must lie between -2\*\*31 and 2\*\*31, got -4294967296 to 0"),
    ],
)
def test_documents_that_are_not_word_ids_are_refused(document, message):
    with pytest.raises(ValueError, match=message):
        count_ngrams([document], max_n=2)


@pytest.mark.parametrize("n", [0, 6])
def test_ngrams_of_a_length_that_was_not_counted_are_refused(n):
    with pytest.raises(ValueError, match=f"n must lie between 1 and 5, got {n}"):
        large_table().ngrams(n)


ON_RAY = """
import sys
import numpy as np
import daft
import ray
from ray.cluster_utils import Cluster
from lightning_iclr.pmi_masking.ngrams import count_ngrams
from tests.pmi_masking.toys import assert_equal_tables, zipf_documents

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address)
assert len([node for node in ray.nodes() if node["Alive"]]) == 2
daft.set_runner_ray()
documents = zipf_documents(0, 20_000)
table = count_ngrams(documents, min_count=4, max_n=3, engine="daft", spill_dir=sys.argv[1])
assert_equal_tables(table, count_ngrams(documents, min_count=4, max_n=3))
assert daft.get_or_create_runner().name == "ray"
print("equal on", len(ray.nodes()), "workers")
"""


@pytest.mark.slow
def test_daft_counts_the_same_on_two_workers_of_ray(tmp_path):
    pytest.importorskip("ray")
    # Ray's processes talk to each other by this machine's address, which the suite's guard takes for the world outside.
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "DAFT_ANALYTICS_ENABLED": "0", "DAFT_PROGRESS_BAR": "0"}
    environment = os.environ | quiet | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", ON_RAY, str(tmp_path / "spill")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert "equal on 2 workers" in run.stdout, run.stdout + run.stderr

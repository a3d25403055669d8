"""The codec of moments: bit-exact round trips, moments that are not finite are not stored, damage is an error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from crosscal.errors import CorruptArtifact, NotFinite
from crosscal.statistics import InputMoments, MomentsAccumulator, Statistic
from crosscal.store import Artifact, Store, digest_of
from crosscal.store import moments as codec
from crosscal.store.moments import read_moments, write_moments

KEY = digest_of("moments")


def activations(inputs: int, tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Correlated inputs with log-normally distributed scales, like those of language models."""
    chance = torch.Generator().manual_seed(inputs)
    mixing_II = torch.eye(inputs) + torch.randn(inputs, inputs, generator=chance) / inputs**0.5
    scale_I = torch.randn(inputs, generator=chance).exp()
    return (torch.randn(tokens, inputs, generator=chance) @ mixing_II * scale_I).to(dtype)


def made(inputs: int, dtype: torch.dtype = torch.float32) -> InputMoments:
    """Moments with a second input stream, as the dense one of `cross` and `drift`."""
    accumulator, input_TI = (
        MomentsAccumulator(inputs, dtype=dtype, wanted=tuple(Statistic)),
        activations(inputs, 50, dtype),
    )
    accumulator.add(input_TI, input_TI + 0.1 * input_TI.flip(1))
    return accumulator.finish()


def with_sum(moments: InputMoments, which: Statistic, sum_: torch.Tensor) -> InputMoments:
    return replace(moments, sums={**moments.sums, which: sum_})


def publish(store: Store, moments: InputMoments) -> Artifact:
    with store.publish("moments", KEY, {}) as folder:
        write_moments(folder, moments)
    return store.get("moments", KEY)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", [1, 2, 3, 63, 64, 65, 257, 700])
def test_every_bit_comes_back(tmp_path: Path, inputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "BATCH_ENTRIES", 10_000)  # several batches
    moments = made(inputs, dtype)
    back = read_moments(store := Store(tmp_path), publish(store, moments))
    assert back.tokens == moments.tokens
    assert back.sums.keys() == moments.sums.keys()
    for which in Statistic:
        assert back[which].dtype == dtype
        assert bits(back[which]) == bits(moments[which])


@pytest.mark.parametrize(
    "wanted",
    [{Statistic.GRAM}, {Statistic.SUM}, {Statistic.SQUARE_SUM, Statistic.ABS_SUM}, {Statistic.CROSS, Statistic.DRIFT}],
)
def test_some_of_the_sums_come_back_alone(tmp_path: Path, wanted: set[Statistic]) -> None:
    moments = made(33).weighted(2.5).only(wanted)
    back = read_moments(store := Store(tmp_path), publish(store, moments))
    assert back.sums.keys() == wanted
    assert all(bits(back[which]) == bits(moments[which]) for which in wanted)
    assert (back.tokens, back.weighted_tokens, back.inputs) == (moments.tokens, moments.weighted_tokens, 33)


def test_extreme_numbers_come_back(tmp_path: Path) -> None:
    least, most = torch.finfo(torch.float32).tiny / 8, torch.finfo(torch.float32).max
    gram_II = torch.tensor([[most, -0.0, least], [-0.0, 0.0, -most], [least, -most, -least]])
    sums = {
        Statistic.GRAM: gram_II,
        Statistic.ABS_SUM: torch.tensor([most, 0.0, least]),
        Statistic.SUM: torch.tensor([-most, -0.0, least]),
        Statistic.CROSS: torch.tensor([[-0.0, -0.0, least], [0.0, -most, -0.0], [-least, most, 0.0]]),
    }
    moments = InputMoments(sums, 0)
    back = read_moments(store := Store(tmp_path), publish(store, moments))
    assert bits(back.gram_II) == bits(gram_II)
    assert bits(back.sum_I) == bits(moments.sum_I)
    assert bits(back[Statistic.CROSS]) == bits(moments[Statistic.CROSS])


def test_moments_of_a_starved_expert_come_back(tmp_path: Path) -> None:
    back = read_moments(store := Store(tmp_path), publish(store, InputMoments.zero(40)))
    assert back.tokens == 0
    assert not back.gram_II.any()


def test_a_matrix_takes_less_than_43_percent(tmp_path: Path) -> None:
    artifact = publish(Store(tmp_path), InputMoments.of(activations(1024, 4096)))
    assert artifact.bytes < 0.43 * 1024 * 1024 * 4


def test_a_matrix_that_is_not_symmetric_takes_twice_as_much(tmp_path: Path) -> None:
    accumulator, input_TI = MomentsAccumulator(1024, wanted=tuple(Statistic)), activations(1024, 4096)
    accumulator.add(input_TI, input_TI + 0.1 * input_TI.flip(1))
    artifact = publish(Store(tmp_path), accumulator.finish().only({Statistic.CROSS}))
    assert artifact.bytes < 0.86 * 1024 * 1024 * 4


def written_by_version_one(folder: Path, moments: InputMoments) -> None:
    """Write format version 1 directly: raw byte planes of the triangle, row by row, and vectors without exponents."""
    gram_II = moments.gram_II.numpy()
    triangle_N = np.concatenate([gram_II[row, row:] for row in range(len(gram_II))])
    planes_PN = triangle_N.view(np.uint8).reshape(-1, gram_II.itemsize).T
    metadata = {"inputs": str(moments.inputs), "tokens": str(moments.tokens), "dtype": str(gram_II.dtype)}
    gram = pa.table({f"byte{plane}": plane_N for plane, plane_N in enumerate(planes_PN)})
    vectors = pa.table({"abs_sum": moments.abs_sum_I.numpy(), "sum": moments.sum_I.numpy()})
    for name, table in (("gram", gram.replace_schema_metadata(metadata)), ("vectors", vectors)):
        with pa.ipc.new_file(str(folder / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_version_one_wrote_is_read_still(tmp_path: Path, dtype: torch.dtype) -> None:
    store, moments = Store(tmp_path), made(65, dtype)
    with store.publish("moments", KEY, {}) as folder:
        written_by_version_one(folder, moments)
    back = read_moments(store, store.get("moments", KEY))
    assert bits(back.gram_II) == bits(moments.gram_II)
    assert bits(back.sum_I) == bits(moments.sum_I)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", Statistic)
def test_what_is_not_finite_is_not_stored(tmp_path: Path, value: float, which: Statistic) -> None:
    moments, store = made(20), Store(tmp_path)
    tensor = moments[which].clone()
    tensor[..., 7] = value
    if which.is_matrix:
        tensor[7, :] = value
    with pytest.raises(NotFinite):
        publish(store, with_sum(moments, which, tensor))
    assert store.find("moments", KEY) is None


def rewritten(folder: Path, *, metadata: dict[str, str] | None = None, drop_rows: int = 0, planes: int = 4) -> None:
    with pa.memory_map(str(folder / "gram.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    table = table.slice(drop_rows).select(range(planes))
    lies = {name.encode(): value.encode() for name, value in (metadata or {}).items()}
    schema = table.schema.with_metadata({**table.schema.metadata, **lies})
    with pa.ipc.new_file(str(folder / "gram.arrow"), schema) as writer:
        writer.write_table(table.replace_schema_metadata(schema.metadata))


def other_vectors(folder: Path, length: int, kind: pa.DataType) -> None:
    table = pa.table({name: pa.array([1.0] * length, kind) for name in ("abs_sum", "sum")})
    with pa.ipc.new_file(str(folder / "vectors.arrow"), table.schema) as writer:
        writer.write_table(table)


def other_exponents(folder: Path, exponent_I: np.ndarray) -> None:
    with pa.memory_map(str(folder / "vectors.arrow")) as source:
        length = len(exponent_I)
        table = pa.ipc.open_file(source).read_all().slice(0, length)
    table = table.set_column(table.column_names.index("exponent"), "exponent", pa.array(exponent_I))
    with pa.ipc.new_file(str(folder / "vectors.arrow"), table.schema) as writer:
        writer.write_table(table)


LIES = {
    "more inputs": lambda f: rewritten(f, metadata={"inputs": "21"}),
    "fewer inputs": lambda f: rewritten(f, metadata={"inputs": "19"}),
    "absurdly many inputs": lambda f: rewritten(f, metadata={"inputs": str(10**9)}),
    "no inputs": lambda f: rewritten(f, metadata={"inputs": "0"}),
    "no number": lambda f: rewritten(f, metadata={"inputs": "many"}),
    "negative tokens": lambda f: rewritten(f, metadata={"tokens": "-1"}),
    "wider numbers": lambda f: rewritten(f, metadata={"dtype": "float64"}),
    "unknown numbers": lambda f: rewritten(f, metadata={"dtype": "int128"}),
    "a missing entry": lambda f: rewritten(f, drop_rows=1),
    "a missing plane": lambda f: rewritten(f, planes=3),
    "no header": lambda f: (f / "gram.arrow").write_bytes((f / "vectors.arrow").read_bytes()),
    "cut short": lambda f: (f / "gram.arrow").write_bytes((f / "gram.arrow").read_bytes()[:-200]),
    "not Arrow": lambda f: (f / "gram.arrow").write_bytes(b"something else"),
    "empty": lambda f: (f / "vectors.arrow").write_bytes(b""),
    "short vectors": lambda f: other_vectors(f, 19, pa.float32()),
    "wide vectors": lambda f: other_vectors(f, 20, pa.float64()),
    "few exponents": lambda f: other_exponents(f, np.zeros(19, np.uint16)),
    "wide exponents": lambda f: other_exponents(f, np.zeros(20, np.uint32)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_is_not_what_it_says_is_an_error_though_its_digest_is_right(tmp_path: Path, lie: str) -> None:
    store = Store(tmp_path)
    with store.publish("moments", KEY, {}) as folder:
        write_moments(folder, made(20))
        LIES[lie](folder)
    with pytest.raises(CorruptArtifact, match="stored moments cannot be read"):
        read_moments(store, store.get("moments", KEY))


@pytest.mark.parametrize("name", ["gram.arrow", "vectors.arrow", "cross.arrow", "drift.arrow"])
def test_a_flipped_bit_is_found_before_it_is_decoded(tmp_path: Path, name: str) -> None:
    artifact = publish(Store(tmp_path), made(20))
    file = tmp_path / "objects" / "moments" / KEY / name
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)
    with pytest.raises(CorruptArtifact, match="digest"):
        read_moments(Store(tmp_path), artifact)

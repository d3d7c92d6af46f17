import numpy as np
import pytest

from mt3_keras import rows


@pytest.mark.parametrize("in_memory", [rows.IN_MEMORY, 64])
def test_rows_are_read_as_they_were_appended_wherever_they_are_kept(monkeypatch, in_memory):
    monkeypatch.setattr(rows, "IN_MEMORY", in_memory)
    numbers = np.arange(60, dtype=np.float32).reshape(20, 3)
    kept = rows.Rows(("f4", 3))
    assert kept.read().shape == (0, 3)
    for i in range(0, 20, 4):
        kept.append(numbers[i : i + 4])
        np.testing.assert_array_equal(kept.read(), numbers[: i + 4])
    np.testing.assert_array_equal(kept.read(5, 7), numbers[5:7])
    fields = rows.Rows("f8, u1")
    fields.append([(0.1, 3)])
    fields.append([(1 / 3, 255), (2.0, 0)])
    assert fields.read().tolist() == [(0.1, 3), (1 / 3, 255), (2.0, 0)]

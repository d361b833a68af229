"""The `--mesh` argument."""

import pytest

from launch.mesh import parse_mesh


@pytest.mark.parametrize(
    ("text", "world_size", "axes", "num_data_ranks"),
    [
        ("fsdp", 2, {"fsdp": 2}, 2),
        ("ddp", 4, {"ddp": 4}, 4),
        ("replicate=2,fsdp=2", 4, {"replicate": 2, "fsdp": 2}, 4),
        ("fsdp,tp=2", 8, {"fsdp": 4, "tp": 2}, 4),
        ("tp=2,fsdp=3", 6, {"fsdp": 3, "tp": 2}, 3),
        ("tp", 2, {"fsdp": 1, "tp": 2}, 1),
        ("replicate=2,fsdp=2,tp=2", 8, {"replicate": 2, "fsdp": 2, "tp": 2}, 4),
        ("fsdp=1", 1, {"fsdp": 1}, 1),
    ],
)
def test_mesh_is_read_outermost_axis_first(text, world_size, axes, num_data_ranks):
    spec = parse_mesh(text, world_size)
    assert spec.axes == tuple(axes.items())
    assert spec.num_data_ranks == num_data_ranks
    assert parse_mesh(str(spec), world_size) == spec


@pytest.mark.parametrize(
    ("text", "world_size", "message"),
    [
        ("zero=2", 2, "unknown axis 'zero'"),
        ("", 1, "unknown axis ''"),
        ("fsdp=2,fsdp=2", 4, "given twice"),
        ("fsdp=two", 2, "not a count"),
        ("fsdp=0", 2, "not a count"),
        ("fsdp=-1", 2, "not a count"),
        ("fsdp=2", 4, "asks for 2 ranks, and torchrun started 4"),
        ("fsdp,tp=3", 4, "a multiple of 3 ranks"),
        ("fsdp,tp", 4, "axes fsdp, tp have no size"),
        ("ddp=2,tp=2", 4, "'ddp' stands alone"),
    ],
)
def test_bad_mesh_is_refused_with_the_reason(text, world_size, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text, world_size)

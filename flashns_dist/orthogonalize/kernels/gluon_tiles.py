# mypy: ignore-errors
"""Which tiles a program of the Gluon kernels takes, and in which order."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _wide_in_order(t, num_blocks):
    """Block row and pair of block columns of wide tile ``t``, two block rows at a time.

    Block rows ``2 g`` and ``2 g + 1`` hold ``g`` and ``g + 1`` wide tiles, hence those before them
    ``g^2``. (Exact below 2^22 tiles.)
    """
    g = gl.sqrt_rn(t.to(gl.float32)).to(gl.int32)
    local = t - g * g
    both = 2 * g + 1 < num_blocks
    row = 2 * g + gl.where(both, 1 - local % 2, 0)
    return row, gl.where(both, local // 2, local)


@gluon.jit
def _wide_tile(t, num_blocks, GROUP: gl.constexpr):
    """The same in an order in which tiles that run together read few different panels.

    ``GROUP`` block rows at a time (an even number), and inside a group columns change slowest.
    """
    first = gl.sqrt_rn(t.to(gl.float32)).to(gl.int32) // (GROUP // 2) * (GROUP // 2)
    height = gl.minimum(GROUP, num_blocks - 2 * first)
    local = t - first * first
    rest = local - height * first
    corner_row, corner_col = _wide_in_order(gl.maximum(rest, 0), height)
    row = 2 * first + gl.where(rest >= 0, corner_row, local % height)
    return row, gl.where(rest >= 0, first + corner_col, local // height)


@gluon.jit
def turns(num_blocks, num_matrices):
    """How many wide tiles and squares there are, and from which turn to which squares are taken.

    Wide tiles are ``BLOCK x 2 BLOCK``, of which the last in an odd block row ends on the diagonal;
    squares are on the diagonal of even block rows. A program takes wide tiles ``turn``, ``turn`` +
    the number of programs, and so on, then squares. Programs that get one wide tile less than
    others take two squares in that turn, as long as there are squares: ``doubled`` of them.
    """
    pairs = num_blocks // 2
    wide = pairs * (pairs + num_blocks % 2) * num_matrices
    squares = (num_blocks + 1) // 2 * num_matrices
    programs = gl.num_programs(0)
    doubled = (programs - wide % programs) % programs
    doubled = gl.minimum(doubled, (squares + 1) // 2)
    stop = wide + doubled + gl.maximum(squares - 2 * doubled, 0)
    program = gl.program_id(0)
    start = program + (gl.maximum(wide - program, 0) + programs - 1) // programs * programs
    return wide, squares, doubled, start, stop


@gluon.jit
def wide_at(turn, num_blocks, GROUP: gl.constexpr):
    """The matrix, block row and first block column of a turn's wide tile."""
    pairs = num_blocks // 2
    each = pairs * (pairs + num_blocks % 2)
    row, col = _wide_tile(turn % each, num_blocks, GROUP)
    return turn // each, row, 2 * col


@gluon.jit
def squares_at(turn, wide, squares, doubled):
    """The first square of a turn, and one more than the last."""
    late = turn - wide
    first = gl.where(late < doubled, 2 * late, late + doubled)
    return first, gl.where(late < doubled, gl.minimum(first + 2, squares), first + 1)


@gluon.jit
def square_at(square, num_blocks):
    """The matrix and block row of a square."""
    each = (num_blocks + 1) // 2
    return square // each, square % each * 2


@gluon.jit
def tile_at(turn, blocks_n, blocks_m, GROUP: gl.constexpr):
    """The matrix, block row and block column of a turn's tile of whole matrices.

    ``GROUP`` block rows at a time, and inside a group columns change slowest.
    """
    each = blocks_n * blocks_m
    t = turn % each
    first = t // (GROUP * blocks_m) * GROUP
    height = gl.minimum(GROUP, blocks_n - first)
    local = t % (GROUP * blocks_m)
    return turn // each, first + local % height, local // height

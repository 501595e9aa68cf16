"""The little algebra that a brain's pose and description take, by numpy's own loops: the same bits with any number of threads and on any x86-64
processor. BLAS and LAPACK order their sums by both, and one number in some thousands is then rounded the other way.
"""

import numpy as np


def times(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """(m, n) · (n,) → (m,)"""
    return np.einsum("mn,n->m", matrix, vector)


def moved(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(3, n): a pose (3, 4) applied to points (n, 3).

    >>> moved(np.array([[2.0, 0, 0, 1], [0, 1, 1, 0], [0, 0, 1, 0]]), np.array([[1.0, 2, 3]])).T.tolist()
    [[3.0, 5.0, 3.0]]
    """
    x, y, z = points.T
    return np.stack([a * x + b * y + c * z + d for a, b, c, d in pose])


def inverse(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """Of a (3, 3) matrix, and its determinant.

    >>> found, determinant = inverse(np.array([[0.0, 2, 0], [0, 0, 4], [1, 0, 0]]))
    >>> found.tolist(), determinant
    ([[0.0, 0.0, 1.0], [0.5, 0.0, 0.0], [0.0, 0.25, 0.0]], 8.0)
    """
    (a, b, c), (d, e, f), (g, h, i) = matrix.tolist()
    determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    adjugate = [e * i - f * h, c * h - b * i, b * f - c * e, f * g - d * i, a * i - c * g, c * d - a * f, d * h - e * g, b * g - a * h, a * e - b * d]
    return np.reshape(adjugate, (3, 3)) / determinant + 0.0, determinant


def orthonormal(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(k, n) orthonormal rows, and the lower triangle (k, k) that makes ``rows`` (k, n), independent ones, of them: Gram–Schmidt, twice."""
    basis, triangle = np.array(rows, np.float64), np.zeros((len(rows), len(rows)))
    for k, row in enumerate(basis):
        for _ in range(2):
            share = times(basis[:k], row)
            row -= np.einsum("m,mn->n", share, basis[:k])
            triangle[k, :k] += share
        triangle[k, k] = np.sqrt(np.einsum("n,n->", row, row))
        row /= triangle[k, k]
    return basis, triangle


def pseudo_inverse(rows: np.ndarray) -> np.ndarray:
    """(k, n): by it ``times`` gives the k coefficients of the ``rows`` (k, n) that fit a vector (n,) best.

    >>> rows = np.array([[1.0, 1, 1], [0, 1, 2]])
    >>> times(pseudo_inverse(rows), 3 * rows[0] + 5 * rows[1]).round(9).tolist()
    [3.0, 5.0]
    """
    found, triangle = orthonormal(rows)
    for k in reversed(range(len(rows))):
        found[k] = (found[k] - np.einsum("m,mn->n", triangle[k + 1 :, k], found[k + 1 :])) / triangle[k, k]
    return found

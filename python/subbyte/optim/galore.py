"""Low-rank projection of gradients (Zhao et al., "GaLore", 2024): optimizer state of rank r instead of the whole matrix."""

import torch

_TYPES = ("std", "reverse_std", "right", "left", "full")


class GaLoreProjector:
    """Projects a gradient matrix G [rows, cols] onto singular vectors of an earlier gradient, and steps back.

    Args:
        rank: number of singular vectors, at least 1; a matrix of smaller sides uses what it has.
        verbose: kept for callers; nothing is printed.
        update_proj_gap: the basis is formed anew from the current gradient when iter is a multiple of it.
        scale: factor of project_back's result.
        proj_type: which side is projected.

            ============  =================================  ========================
            proj_type     rows >= cols                       rows < cols
            ============  =================================  ========================
            std           right: R = G P^T, back R P         left: R = U^T G, back U R
            reverse_std   left                               right
            right, left   always that side                   always that side
            full          R = U^T G P^T, back U R P          the same
            ============  =================================  ========================

    P holds the first `rank` right singular vectors as rows, U the left ones as columns, found in float32 and cast to G's dtype.
    The side is chosen when the basis is formed and kept with it. What an optimizer has gathered in the old basis (its moments)
    is not turned into the new one at a refresh: it goes on as it is, as in the paper.

    state_dict() holds tensors and strings only.
    """

    def __init__(self, rank, verbose=False, update_proj_gap=200, scale=1.0, proj_type="std"):
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"GaLoreProjector: rank is {rank!r}, expected an integer of at least 1")
        if isinstance(update_proj_gap, bool) or not isinstance(update_proj_gap, int) or update_proj_gap < 1:
            raise ValueError(f"GaLoreProjector: update_proj_gap is {update_proj_gap!r}, expected an integer of at least 1")
        if proj_type not in _TYPES:
            raise ValueError(f"GaLoreProjector: proj_type is {proj_type!r}, expected one of {', '.join(_TYPES)}")
        self.rank, self.verbose, self.update_proj_gap = rank, verbose, update_proj_gap
        self.scale, self.proj_type = scale, proj_type
        self.side = None  # "right", "left" or "full" of the present basis
        self.ortho_matrix = None  # P, U, or [U, P]

    def _side_of(self, rows, cols):
        if self.proj_type in ("right", "left", "full"):
            return self.proj_type
        tall = rows >= cols
        return "right" if tall == (self.proj_type == "std") else "left"

    @staticmethod
    def get_orthogonal_matrix(weights, rank, type):
        """Singular vectors of weights [rows, cols]: P [r, cols] for "right", U [rows, r] for "left", [U, P] for "full"."""
        if type not in ("right", "left", "full"):
            raise ValueError(f"get_orthogonal_matrix: type is {type!r}, expected right, left or full")
        matrix = weights.detach()
        u, _, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
        left, right = u[:, :rank].to(matrix.dtype).contiguous(), vh[:rank].to(matrix.dtype).contiguous()
        return right if type == "right" else left if type == "left" else [left, right]

    def project(self, full_rank_grad, iter):
        """R of G. iter: steps taken before this one."""
        if full_rank_grad.dim() != 2:
            raise ValueError(f"GaLoreProjector: the gradient has {full_rank_grad.dim()} dimensions, expected a matrix")
        if self.ortho_matrix is None or int(iter) % self.update_proj_gap == 0:
            self.side = self._side_of(*full_rank_grad.shape)
            self.ortho_matrix = self.get_orthogonal_matrix(full_rank_grad, self.rank, self.side)
        if self.side == "right":
            return full_rank_grad @ self.ortho_matrix.t()
        if self.side == "left":
            return self.ortho_matrix.t() @ full_rank_grad
        left, right = self.ortho_matrix
        return left.t() @ full_rank_grad @ right.t()

    def project_back(self, low_rank_grad):
        """`scale` times the matrix that R stands for."""
        if self.ortho_matrix is None:
            raise ValueError("GaLoreProjector: project_back before project, there is no basis yet")
        if self.side == "right":
            full = low_rank_grad @ self.ortho_matrix
        elif self.side == "left":
            full = self.ortho_matrix @ low_rank_grad
        else:
            left, right = self.ortho_matrix
            full = left @ low_rank_grad @ right
        return full * self.scale

    def state_dict(self):
        """The basis: {} before the first project, else side and the tensors left and right as far as there are."""
        if self.ortho_matrix is None:
            return {}
        names = {"right": ("right",), "left": ("left",), "full": ("left", "right")}[self.side]
        tensors = self.ortho_matrix if self.side == "full" else [self.ortho_matrix]
        return {"side": self.side, **dict(zip(names, tensors))}

    def load_state_dict(self, state):
        self.side, self.ortho_matrix = state.get("side"), None
        if self.side is not None:
            self.ortho_matrix = [state["left"], state["right"]] if self.side == "full" else state[self.side]

"""From the student's hidden space to the teacher's."""

import torch


class Projector(torch.nn.Module):
    """Map hidden states ``(..., student_size)`` to ``(..., teacher_size)``.

    It always leads from student to teacher: on the teacher's side a projector
    could collapse both to a constant. It is trained in the representation stage
    and dropped after it.

    It is linear, or has one hidden layer of `hidden_size`.

    Example
    -------
    >>> projector = Projector(student_size=4, teacher_size=6)
    >>> tuple(projector(torch.randn(2, 5, 4)).shape)
    (2, 5, 6)
    """

    def __init__(self, student_size, teacher_size, hidden_size=None):
        super().__init__()
        if hidden_size is None:
            self.map = torch.nn.Linear(student_size, teacher_size)
        else:
            self.map = torch.nn.Sequential(
                torch.nn.Linear(student_size, hidden_size),
                torch.nn.ReLU(),
                torch.nn.Linear(hidden_size, teacher_size),
            )

    def forward(self, hidden):
        """Project hidden states."""
        return self.map(hidden)

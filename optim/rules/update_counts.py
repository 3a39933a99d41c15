"""Count the elements that update rules are applied to, as proof that weights get their rule."""


class UpdateCounts:
    """Numbers of elements that rules updated, by parameter and rule.

    An optimizer whose attribute `counts` is one of these adds to it at every update.
    """

    def __init__(self) -> None:
        self.elements: dict[str, dict[str, int]] = {}
        """Parameter -> rule -> elements. The name of a group stands for parameters that were
        replaced by slices."""

    def add(self, name: str, rule: str, num_elements: int) -> None:
        """Count an update of elements of one parameter."""
        of_parameter = self.elements.setdefault(name, {})
        of_parameter[rule] = of_parameter.get(rule, 0) + num_elements

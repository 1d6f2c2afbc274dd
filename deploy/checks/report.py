"""What was checked, and what is wrong."""


class Report:
    """Collects faults; prints a line for each group of checks."""

    def __init__(self) -> None:
        self.checks = 0
        self.faults: list[str] = []

    def group(self, what: str, faults: list[str], count: int = 1) -> None:
        """Notes `count` checks of one kind and their faults."""
        self.checks += count
        self.faults += [f"{what}: {fault}" for fault in faults]
        print(f"check-deploy: {'FAULT' if faults else 'ok':5} {what}" + (f" ({count})" if count > 1 else ""))

    def close(self) -> int:
        """Prints the sum; the exit code."""
        for fault in self.faults:
            print(f"check-deploy: {fault}")
        print(f"check-deploy: {self.checks} checks, {len(self.faults)} faults")
        return 1 if self.faults else 0

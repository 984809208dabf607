"""Tables for people."""


def print_table(rows: dict[str, str]) -> None:
    """What a dry run found, a name and a value on each line."""
    width = max(map(len, rows))
    print("dry run: nothing was written")
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")

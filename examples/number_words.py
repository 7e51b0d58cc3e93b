"""Numbers below 1,000,000,000 in words, in English and in Portuguese."""

from __future__ import annotations

from collections.abc import Callable

LIMIT = 10**9

UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]

# Brazil's spelling; Portugal writes dezasseis, dezassete and dezanove.
UNIDADES = [
    "zero", "um", "dois", "três", "quatro", "cinco", "seis", "sete", "oito", "nove", "dez", "onze", "doze",
    "treze", "catorze", "quinze", "dezesseis", "dezessete", "dezoito", "dezenove",
]  # fmt: skip
DEZENAS = ["vinte", "trinta", "quarenta", "cinquenta", "sessenta", "setenta", "oitenta", "noventa"]
CENTENAS = [
    "cento", "duzentos", "trezentos", "quatrocentos", "quinhentos", "seiscentos", "setecentos", "oitocentos",
    "novecentos",
]  # fmt: skip


def english(number: int) -> str:
    """Return the number as in "two million and five" or "four hundred and twenty-one thousand six hundred"."""
    if number == 0:
        return UNITS[0]
    parts = [f"{_english_below_1000(n)}{scale}" for n, scale in groups(number, (" million", " thousand", ""))]
    if len(parts) > 1 and 0 < number % 1000 < 100:
        parts.insert(-1, "and")
    return " ".join(parts)


def portuguese(number: int) -> str:
    """Return the number as in "dois milhões e cinco" or "quatrocentos e vinte e um mil e seiscentos".

    Within a group of three digits, "e" joins hundreds, tens and units. Between groups it is used only before the last
    group, and only if this group is below a hundred or consists of hundreds alone.
    """
    if number == 0:
        return UNIDADES[0]
    found = groups(number, ("milhões", "mil", ""))
    parts = [_portuguese_group(n, scale) for n, scale in found]
    last = found[-1][0]
    if len(parts) > 1 and (last < 100 or last % 100 == 0):
        parts.insert(-1, "e")
    return " ".join(parts)


def groups(number: int, scales: tuple[str, str, str]) -> list[tuple[int, str]]:
    """Return the groups of three digits that are not 000, from the left, with their scales."""
    if not 0 <= number < LIMIT:
        raise ValueError(f"{number} is not within 0 to {LIMIT - 1}")
    digits = (number // 10**6, number // 1000 % 1000, number % 1000)
    return [(n, scale) for n, scale in zip(digits, scales, strict=True) if n]


def vocabulary() -> list[str]:
    """Return every word of both languages."""
    samples = [*range(1000), 1000, 10**6, 2 * 10**6]
    return sorted({word for language in (english, portuguese) for n in samples for word in words(language, n)})


def words(language: Callable[[int], str], number: int) -> list[str]:
    """Return the number's words; a hyphen separates two."""
    return language(number).replace("-", " ").split()


def _english_below_1000(n: int) -> str:
    hundreds, rest = divmod(n, 100)
    below = UNITS[rest] if rest < 20 else TENS[rest // 10 - 2] + (f"-{UNITS[rest % 10]}" if rest % 10 else "")
    if not hundreds:
        return below
    return f"{UNITS[hundreds]} hundred" + (f" and {below}" if rest else "")


def _portuguese_group(n: int, scale: str) -> str:
    if scale == "mil" and n == 1:
        return "mil"
    if scale == "milhões" and n == 1:
        return "um milhão"
    return f"{_portuguese_below_1000(n)} {scale}".rstrip()


def _portuguese_below_1000(n: int) -> str:
    if n == 100:
        return "cem"
    hundreds, rest = divmod(n, 100)
    parts = [CENTENAS[hundreds - 1]] if hundreds else []
    if rest >= 20:
        parts.append(DEZENAS[rest // 10 - 2])
        rest %= 10
    if rest:
        parts.append(UNIDADES[rest])
    return " e ".join(parts)

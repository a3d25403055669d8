"""Common English words that a generated text may begin with, so that a multilingual model writes English."""

STOP_WORDS: tuple[str, ...] = tuple(
    """
    a about above across after again against all almost alone along already also although always among an and another
    any anyone anything are around as at away because been before behind being below between both but by can could did
    do does doing down during each either else enough even ever every everyone everything few first for from further
    had has have having he her here hers him his how however i if in indeed into is it its itself just last least less
    many may me might more most much must my neither never next no nobody none nor not nothing now of off often on once
    one only onto or other others our out over own perhaps quite rather same several she should since so some someone
    something still such than that the their them then there therefore these they this those though through thus to
    together too toward under until up upon us very was we well were what when where whether which while who whole whose
    why will with within without would yet you your
    """.split()  # noqa: SIM905  a list of 200 quoted strings would be harder to read
)

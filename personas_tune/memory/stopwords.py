"""English words that say nothing about a summary's theme."""

_GRAMMAR = """
a about across after again against ago all alone along also always am among an and another any are around as at away
back be became because become becomes been before begin begins behind being between beyond both bring brings but by
came can cannot come comes could day days deal deals did discover discovers do does doing done down during each either
else end ends even ever every everyone everything face faces fall falls far few film finally find finding finds first
five follow follows for forced forces four from full gave get gets getting give gives go goes going gone good great
group had has have having he help helps her here herself him himself his how however if in including inside instead
into is it its itself join joins journey just keep keeps know known knows last later lead leads learn learns leave
leaves left let life like little live lives long look looking looks lost made make makes making man many may me meet
meets men might more most movie much must my navigate navigates near need needs never new next no nor not nothing now
of off old on once one only onto or order other others our out over own part people place plan plans put quickly quite
rather reach really return returns same save seem seems seen set sets several she should since so some somehow someone
something soon start starts still stop stories story struggle struggles such take taken takes taking tale team than
that the their them themselves then there these they thing things third this those though three through throughout
thus time times to together told too toward towards tries try trying turn turned turns two under unexpected until up
upon us use used uses using various very want wants was way ways we well went were what when where whether which while
who whom whose why will with within without woman women work works world would year years yet you young your
"""

_TELLING = """
accidentally action adventure adventures amidst arrives backdrop battle battles becoming best bond book caught
challenge challenges challenging chance changing chaos characters chase comedic comedy coming complexities confront
consequences control country couple delve delves desire desires determined discovery documentary drama dramatic embark
embarking embarks emotional encounter encountering encounters ensues entangled escape escapes events experience
experiences exploration explore explores exploring facing fight fighting fights filled form former forming forms
friend friends ghastly happens hidden hope horror includes individuals involving leading leaving living loosely lord
meaning misfit moments moves musical named navigating norms owner packed pair past path personal plot portrayal post
power powers prevent prove provoking pursuit quest race reality relationship relationships romance run search seek
seeking seeks self sent series setting show showcasing solace stakes star struggling teams tested thought threaten
threatens thriller torn transforms true truth turmoil twists uncover uncovering uncovers unfold unfolding unfolds
upside visually wants web webs working wreaks
"""

_PRAISE = """
beautiful beloved big bizarre brilliant bumbling captivating charismatic charming chilling classic compelling complex
cunning dangerous daring dark darkly deadly deep delightful desperate eccentric enchanting epic extraordinary famous
fearless gripping gritty harrowing haunting heartbreaking heartfelt heartwarming high hilarious iconic intense
intricate legendary mesmerizing mischievous moving mysterious passionate perfect perilous poignant powerful quirky
real relentless ruthless seductive sinister skilled small stunning surreal talented terrifying thrilling touching
tough tragic treacherous troubled tumultuous twisted unconventional unforgettable unique unlikely vibrant wild
"""

STOPWORDS = frozenset(f"{_GRAMMAR} {_TELLING} {_PRAISE}".split())

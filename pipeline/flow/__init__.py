"""AR flow matching: noise and a distribution over the codebook become a code (paper Eq. 4 to 6).

In come noise x ~ N(0, I), log p and the codebook; out come codes. It knows neither teachers nor sequences.
"""

"""Operations with a plain-torch definition and faster backends; knows nothing of transformers."""

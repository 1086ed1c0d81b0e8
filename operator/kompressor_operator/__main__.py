"""`python -m kompressor_operator`"""

from kompressor_operator.main import main

if __name__ == "__main__":
    main()

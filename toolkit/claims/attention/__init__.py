"""Claims of the systems that move less inside one device."""

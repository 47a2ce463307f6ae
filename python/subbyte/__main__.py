from .doctor import doctor

print(doctor())

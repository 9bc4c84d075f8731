"""Countries and their capitals, as they are written in the middle of an English sentence.

Two kinds of states are left out: those whose seat of government and constitutional capital differ or are contested
(Benin, Bolivia, Eswatini, Israel, Nauru, Palestine, South Africa, Sri Lanka), since a task needs one right answer, and
those whose capital contains their name (Djibouti, Guinea-Bissau, Luxembourg, Monaco, San Marino, Sao Tome, Singapore,
Vatican City), since the question would contain the answer. Scotland, Wales and Northern Ireland are included.
"""

from __future__ import annotations

_TABLE = """
Afghanistan: Kabul; Albania: Tirana; Algeria: Algiers; Andorra: Andorra la Vella; Angola: Luanda;
Antigua and Barbuda: Saint John's; Argentina: Buenos Aires; Armenia: Yerevan; Australia: Canberra; Austria: Vienna;
Azerbaijan: Baku; the Bahamas: Nassau; Bahrain: Manama; Bangladesh: Dhaka; Barbados: Bridgetown; Belarus: Minsk;
Belgium: Brussels; Belize: Belmopan; Bhutan: Thimphu; Bosnia and Herzegovina: Sarajevo; Botswana: Gaborone;
Brazil: Brasilia; Brunei: Bandar Seri Begawan; Bulgaria: Sofia; Burkina Faso: Ouagadougou; Burundi: Gitega;
Cambodia: Phnom Penh; Cameroon: Yaounde; Canada: Ottawa; Cape Verde: Praia; the Central African Republic: Bangui;
Chad: N'Djamena; Chile: Santiago; China: Beijing; Colombia: Bogota; the Comoros: Moroni;
the Republic of the Congo: Brazzaville; the Democratic Republic of the Congo: Kinshasa; Costa Rica: San Jose;
Croatia: Zagreb; Cuba: Havana; Cyprus: Nicosia; the Czech Republic: Prague; Denmark: Copenhagen; Dominica: Roseau;
the Dominican Republic: Santo Domingo; East Timor: Dili; Ecuador: Quito; Egypt: Cairo; El Salvador: San Salvador;
Equatorial Guinea: Malabo; Eritrea: Asmara; Estonia: Tallinn; Ethiopia: Addis Ababa; Fiji: Suva; Finland: Helsinki;
France: Paris; Gabon: Libreville; the Gambia: Banjul; Georgia: Tbilisi; Germany: Berlin; Ghana: Accra; Greece: Athens;
Grenada: Saint George's; Guatemala: Guatemala City; Guinea: Conakry; Guyana: Georgetown;
Haiti: Port-au-Prince; Honduras: Tegucigalpa; Hungary: Budapest; Iceland: Reykjavik; India: New Delhi;
Indonesia: Jakarta; Iran: Tehran; Iraq: Baghdad; Ireland: Dublin; Italy: Rome; Ivory Coast: Yamoussoukro;
Jamaica: Kingston; Japan: Tokyo; Jordan: Amman; Kazakhstan: Astana; Kenya: Nairobi; Kiribati: Tarawa;
Kosovo: Pristina; Kuwait: Kuwait City; Kyrgyzstan: Bishkek; Laos: Vientiane; Latvia: Riga; Lebanon: Beirut;
Lesotho: Maseru; Liberia: Monrovia; Libya: Tripoli; Liechtenstein: Vaduz; Lithuania: Vilnius;
Madagascar: Antananarivo; Malawi: Lilongwe; Malaysia: Kuala Lumpur; the Maldives: Male; Mali: Bamako; Malta: Valletta;
the Marshall Islands: Majuro; Mauritania: Nouakchott; Mauritius: Port Louis; Mexico: Mexico City; Micronesia: Palikir;
Moldova: Chisinau; Mongolia: Ulaanbaatar; Montenegro: Podgorica; Morocco: Rabat; Mozambique: Maputo;
Myanmar: Naypyidaw; Namibia: Windhoek; Nepal: Kathmandu; the Netherlands: Amsterdam; New Zealand: Wellington;
Nicaragua: Managua; Niger: Niamey; Nigeria: Abuja; North Korea: Pyongyang; North Macedonia: Skopje;
Northern Ireland: Belfast; Norway: Oslo; Oman: Muscat; Pakistan: Islamabad; Palau: Ngerulmud; Panama: Panama City;
Papua New Guinea: Port Moresby; Paraguay: Asuncion; Peru: Lima; the Philippines: Manila; Poland: Warsaw;
Portugal: Lisbon; Qatar: Doha; Romania: Bucharest; Russia: Moscow; Rwanda: Kigali; Saint Kitts and Nevis: Basseterre;
Saint Lucia: Castries; Saint Vincent and the Grenadines: Kingstown; Samoa: Apia;
Saudi Arabia: Riyadh; Scotland: Edinburgh; Senegal: Dakar; Serbia: Belgrade; the Seychelles: Victoria;
Sierra Leone: Freetown; Slovakia: Bratislava; Slovenia: Ljubljana; the Solomon Islands: Honiara; Somalia: Mogadishu;
South Korea: Seoul; South Sudan: Juba; Spain: Madrid; Sudan: Khartoum; Suriname: Paramaribo; Sweden: Stockholm;
Switzerland: Bern; Syria: Damascus; Taiwan: Taipei; Tajikistan: Dushanbe; Tanzania: Dodoma; Thailand: Bangkok;
Togo: Lome; Tonga: Nuku'alofa; Trinidad and Tobago: Port of Spain; Tunisia: Tunis; Turkey: Ankara;
Turkmenistan: Ashgabat; Tuvalu: Funafuti; Uganda: Kampala; Ukraine: Kyiv; the United Arab Emirates: Abu Dhabi;
the United Kingdom: London; the United States: Washington; Uruguay: Montevideo; Uzbekistan: Tashkent;
Vanuatu: Port Vila; Venezuela: Caracas; Vietnam: Hanoi; Wales: Cardiff; Yemen: Sanaa; Zambia: Lusaka; Zimbabwe: Harare
"""


def _parsed(table: str) -> dict[str, str]:
    pairs = (entry.split(":") for entry in table.split(";"))
    return {country.strip(): capital.strip() for country, capital in pairs}


CAPITALS: dict[str, str] = _parsed(_TABLE)
"""The capital of each country, in alphabetical order of the countries, with an article where English has one."""
